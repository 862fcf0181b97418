"""``veloxlab`` alone opens JupyterLab at the tour; ``veloxlab doctor`` checks the installation."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from veloxlab.cli.arguments import Commands
from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically
from veloxlab.texts import is_installed, shipped_folder

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")


def open_lab(options: argparse.Namespace) -> int:
    """Open JupyterLab at the tour notebook; the server replaces this process."""
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed; run `uv pip install jupyterlab`.")
    # JupyterLab also prints this address, for a browser on another machine
    start = f"--LabApp.default_url=/lab/tree/{TOUR}"
    arguments = [sys.executable, "-m", "jupyterlab", str(_notebooks()), start, *options.passed_on]
    if os.geteuid() == 0 and "--allow-root" not in arguments:
        print("This process runs as root, so JupyterLab starts with --allow-root.", file=sys.stderr)
        arguments.append("--allow-root")
    os.execv(sys.executable, arguments)


def _notebooks() -> Path:
    """Return the folder of notebooks: that of the clone, or a copy of that of the installed package."""
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


MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="check the device, the packages and the model's weights")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=show_checks, passes_on="nothing")


def show_checks(options: argparse.Namespace) -> int:
    """Print the checks as a table or as JSON; return status 1 if a check failed."""
    from veloxlab.checkup import doctor

    checks = doctor()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint:
                print(f"      {'':<{width}}  -> {check.hint}")
    return int(any(check.status == "fail" for check in checks))
