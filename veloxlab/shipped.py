"""Where the files that come with veloxlab lie: its texts and its notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from veloxlab.errors import InputError

PACKAGE = Path(__file__).parent


def shipped_folder(name: Literal["data", "notebooks"]) -> Path:
    """Find a folder of shipped files: inside an installed package, beside the package in a clone.

    Raises
    ------
    InputError
        It is in neither place.
    """
    # the package first: beside an installed one lie other people's folders
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise InputError(f"The folder {name} of veloxlab is missing; install veloxlab again, or use a clone of it.")


def is_installed(folder: Path) -> bool:
    """Tell whether a shipped folder belongs to an installed package, where a user should not work in it."""
    return folder.is_relative_to(PACKAGE)
