"""JupyterLab at the tour, the doctor, and mlx-lm's own commands with a compressed cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically
from veloxlab.texts import is_installed, shipped_folder

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")
OF_MLX_LM = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}  # our names, and its own
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def open_lab(passed_on: Sequence[str]) -> int:
    """Open JupyterLab at the tour notebook; the server replaces this process."""
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed; run `uv pip install jupyterlab`.")
    # JupyterLab also prints this address, for a browser on another machine
    start = f"--LabApp.default_url=/lab/tree/{TOUR}"
    arguments = [sys.executable, "-m", "jupyterlab", str(_notebooks()), start, *passed_on]
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


def show_checks(as_json: bool) -> int:
    """Print the checks as a table or as JSON; return status 1 if a check failed."""
    from veloxlab.checkup import doctor

    checks = doctor()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint:
                print(f"      {'':<{width}}  -> {check.hint}")
    return int(any(check.status == "fail" for check in checks))


def run_mlx_lm(
    command: str,
    model: str,
    method: str | None,
    plan: Path | None,
    calibration: Sequence[Path],
    passed_on: Sequence[str],
    **numbers: Any,
) -> int:
    """Run a command of mlx-lm; ``numbers`` are those of `veloxlab.make_cache`, None where not given."""
    from veloxlab.cache.calibration import Calibration
    from veloxlab.cache.plan import Plan
    from veloxlab.serve.commands import Wanted, run

    if plan is not None and method is not None:
        raise InputError("--plan already contains the method of each layer: leave out --method.")
    settings = {name: number for name, number in numbers.items() if number is not None}
    loaded = None if plan is None else Plan.load(plan)
    wanted = Wanted(loaded, method, settings, [*map(Calibration.load, calibration)])
    run(command, OF_MLX_LM[command], model, wanted, passed_on)
    return 0
