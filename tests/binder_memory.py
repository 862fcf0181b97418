"""Measures the memory of the tour on Binder: ``uv run python -m tests.binder_memory``.

A session on Binder may use 1 to 2 GB. This makes repo2docker's base environment in a temporary folder,
clones the last commit, runs the steps of binder/, starts JupyterLab and runs the tour. The peak is the sum of the most
resident bytes (VmHWM) of the server, the kernel and their children. It is an upper bound: shared pages count
twice, and peaks at different times are added. Linux only; uv must find the Python of binder/runtime.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from veloxlab.store import write_atomically

ROOT = Path(__file__).parents[1]
BASE = ("jupyterlab==4.4.9", "ipywidgets==8.1.7")  # of repo2docker's own environment (2026-08)
NAMED = ("veloxlab", "mlx", "mlx-lm", "jupyterlab", "ipywidgets", "ipykernel", "polars", "altair")
MOST_BYTES = 2 * 10**9
CELL_SECONDS = 600
EVERY = 0.2  # seconds between two reads of the processes' memory


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; return 1 if the tour needs more memory than Binder has."""
    parser = argparse.ArgumentParser(description="Measure the tour's memory as on Binder.")
    parser.add_argument("--out", type=Path, help="folder for binder_memory.json (default: only print)")
    out = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory(prefix="binder_") as folder:
        found = measure(Path(folder))
    text = json.dumps(found, indent=1)
    print(text)
    if out:
        write_atomically(out / "binder_memory.json", f"{text}\n".encode())
    return int(found["peak_bytes"] > MOST_BYTES)


def measure(folder: Path) -> dict[str, Any]:
    """Run Binder's steps in a folder; return seconds of each step, and peak bytes of a session's processes."""
    clone, env = folder / "clone", alone(folder)
    subprocess.run(("git", "clone", "--quiet", ROOT, clone), check=True)
    python = (clone / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    install = ("pip", "install", "--quiet", "--no-cache-dir")
    steps: dict[str, list[tuple[str, ...]]] = {
        "environment": [("uv", "venv", "--quiet", "--seed", "--python", python, f"{folder}/env"), (*install, *BASE)],
        "requirements": [(*install, "-r", "binder/requirements.txt")],
        "postBuild": [("binder/postBuild",)],
    }
    seconds: dict[str, float] = {}
    for name, commands in steps.items():
        begun = time.perf_counter()
        for command in commands:
            subprocess.run(command, check=True, cwd=clone, env=env, stdout=sys.stderr)
        seconds[name] = round(time.perf_counter() - begun, 1)
        print(f"{name}: {seconds[name]} s", file=sys.stderr)

    begun = time.perf_counter()
    server, kernel = tour_peaks(clone, env)
    seconds["tour"] = round(time.perf_counter() - begun, 1)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(env),
        "seconds": seconds,
        "server_peak_bytes": server,
        "kernel_peak_bytes": kernel,
        "peak_bytes": server + kernel,
    }


def alone(folder: Path) -> dict[str, str]:
    """Return environment variables for the programs of ``folder/env``, with caches and settings in the folder."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["PATH"] = f"{folder / 'env' / 'bin'}{os.pathsep}{env['PATH']}"
    env |= {f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "DATA")}
    env |= {f"JUPYTER_{kind}_DIR": str(folder / "jupyter" / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    return env | {"IPYTHONDIR": str(folder / "ipython")}


def versions(env: dict[str, str]) -> dict[str, str]:
    """Return the installed versions of Python and of the relevant packages."""
    say = f"import json, platform; from importlib.metadata import version; names = {NAMED}; "
    say += "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in names}))"
    said = subprocess.run(("python", "-c", say), check=True, env=env, capture_output=True)
    found: dict[str, str] = json.loads(said.stdout)
    return found


def tour_peaks(clone: Path, env: dict[str, str]) -> tuple[int, int]:
    """Run the tour beside a JupyterLab server; return peak bytes of the server, and of the kernel with its children."""
    execute = ("--execute", f"--ExecutePreprocessor.timeout={CELL_SECONDS}", "--stdout")
    tour = ("jupyter", "nbconvert", "--to", "notebook", *execute, "notebooks/00_tour.ipynb")
    servers: dict[int, int] = {}
    kernels: dict[int, int] = {}
    with (
        running(("jupyter", "lab", "--no-browser", "--allow-root"), clone, env) as server,
        running(tour, clone, env) as client,  # does not count: on Binder the server is the client
    ):
        while client.poll() is None:
            servers |= peaks([server.pid, *below(server.pid)])
            kernels |= peaks(below(client.pid))
            time.sleep(EVERY)
        if client.returncode or server.poll() is not None:
            sys.exit("The tour, or the server beside it, did not run to the end: what it said is above.")
    return sum(servers.values()), sum(kernels.values())


@contextlib.contextmanager
def running(command: tuple[str, ...], folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background, and end it and its children afterwards."""
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def below(pid: int) -> list[int]:
    """Return ids of a process's children, of their children and so on."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended
            for child in map(int, path.read_text().split()):
                found += [child, *below(child)]
    return found


def peaks(pids: list[int]) -> dict[int, int]:
    """Return the most bytes that each process has had resident."""
    found: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):  # a process that has ended
            status = Path(f"/proc/{pid}/status").read_text()
            if resident := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):  # a zombie has none
                found[pid] = int(resident[1]) * 1024
    return found


if __name__ == "__main__":
    sys.exit(main())
