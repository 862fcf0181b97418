"""Without a command: JupyterLab on the tour."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from veloxlab.errors import InputError
from veloxlab.shipped import is_installed, shipped_folder
from veloxlab.store import make_folder, write_atomically

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")


def open_lab(options: argparse.Namespace) -> int:
    """Open JupyterLab on the tour notebook; this process becomes the server's."""
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed; run `uv pip install jupyterlab`.")
    # an address and not the file's path: JupyterLab prints it too, for a browser on another machine
    start = f"--LabApp.default_url=/lab/tree/{TOUR}"
    arguments = [sys.executable, "-m", "jupyterlab", str(_notebooks()), start, *options.passed_on]
    if os.geteuid() == 0 and "--allow-root" not in arguments:
        print("Running as root, so JupyterLab is started with --allow-root.", file=sys.stderr)
        arguments.append("--allow-root")
    os.execv(sys.executable, arguments)


def _notebooks() -> Path:
    """Give the folder of notebooks to work in: a clone's own, or a copy of an installed package's."""
    folder = shipped_folder("notebooks")
    if not is_installed(folder):
        return folder
    make_folder(COPY_FOLDER)
    for notebook in sorted(folder.glob("*.ipynb")):
        copy = COPY_FOLDER / notebook.name
        if not copy.exists():  # a user's changes are never overwritten
            write_atomically(copy, notebook.read_bytes())
    print(f"The notebooks are in {COPY_FOLDER.resolve()}.", file=sys.stderr)
    return COPY_FOLDER.resolve()
