"""JupyterLab at the tour, the doctor, and mlx-lm's own commands with a compressed cache."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically
from veloxlab.texts import is_installed, shipped_folder

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
OF_MLX_LM = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}
"""Our names of mlx-lm's commands, and its own."""
NUMBERS = {
    "bits": "code bits per value (default: 4)",
    "key_bits": "code bits of keys, if different",
    "value_bits": "code bits of values, if different",
    "sinks": "number of exact first tokens (default: 4)",
    "window": "number of exact newest tokens (default: 64)",
    "max_kv_size": "maximum number of tokens in the cache; older tokens are dropped (default: no limit)",
}
"""Numbers that a compressed cache takes, with their help."""


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


def run_mlx_lm(options: argparse.Namespace) -> int:
    """Run one of mlx-lm's commands."""
    from veloxlab.cache.calibration import Calibration
    from veloxlab.cache.plan import Plan
    from veloxlab.serve.commands import Wanted, run

    settings = {name: getattr(options, name) for name in NUMBERS if getattr(options, name) is not None}
    if options.plan is not None and options.method is not None:
        raise InputError("--plan already contains the method of each layer: leave out --method.")
    plan = None if options.plan is None else Plan.load(options.plan)
    wanted = Wanted(plan, options.method, settings, [Calibration.load(path) for path in options.calibration])
    run(options.command, OF_MLX_LM[options.command], options.model, wanted, options.passed_on)
    return 0
