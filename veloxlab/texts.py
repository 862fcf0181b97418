"""The texts and notebooks that ship with veloxlab, and their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from veloxlab.checks import checked, choice
from veloxlab.errors import InputError

__all__ = ["excerpt"]

PACKAGE = Path(__file__).parent
Split = Literal["test", "validation", "calibration"]
Tokenizer: TypeAlias = Any  # mlx-lm's TokenizerWrapper, or anything with `encode`


def shipped_folder(name: Literal["data", "notebooks"]) -> Path:
    """Return a folder of shipped files: in an installed package, or beside it in a clone; `InputError` if missing."""
    # the package first: the folders beside an installed one are not ours
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise InputError(f"The folder {name} of veloxlab is missing; install veloxlab again, or use a clone of it.")


@checked(split=choice(*get_args(Split)))
def excerpt(split: Split = "test") -> str:
    """Return the first articles of a split of WikiText-2, about 100,000 characters (25,000 tokens).

    Calibrate on ``"validation"`` and evaluate on ``"test"``, never the other way round. ``"calibration"`` is a mixed
    text, of validation articles, code and dialogue, for methods that learn from the loss.
    Raises `InputError` if there is no such split, or the file is not installed.
    """
    name = "calibration_mix" if split == "calibration" else f"wikitext2_{split}_excerpt"
    path = shipped_folder("data") / f"{name}.txt"
    if not path.is_file():
        raise InputError(f"The text {path} is missing; install veloxlab again, or use a clone of it.")
    return path.read_text(encoding="utf-8")
