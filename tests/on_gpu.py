"""All GPU work in one command: the parity suite, then the benchmarks: ``python -m tests.on_gpu FOLDER [options]``.

The folder gets ``parity.json`` (the number of comparisons that passed, those that failed, and the commit) and
``bench.json``, both with device, driver, versions and date. The options are those of ``veloxlab bench``. A kernel takes
a second to compile, so several processes share the suite, and build the kernels of the benchmarks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from veloxlab import cli
from veloxlab.codecs import METHODS
from veloxlab.measure.bench import timing
from veloxlab.measure.bench.shapes import SHAPES
from veloxlab.measure.bench.timing import facts
from veloxlab.store import write_atomically

SUITE = Path(__file__).with_name("test_kernels_gpu.py")
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    *("-p", "no:cacheprovider", "-p", "no:nbval", "-p", "no:benchmark"),  # the last one warns of several processes
    "-o",
    "addopts=",
    "-m",
    "gpu",
)
_LEFT = 2  # processors without a compiling process
_ALONE = dict.fromkeys(("OPENBLAS_NUM_THREADS", "VELOXLAB_THREADS"), "1")  # threads that spin take the cores of others
COMMIT = "VELOXLAB_COMMIT"  # in the environment, if the folder is no clone
_BUILD = """
import veloxlab, mlx.core as mx
from veloxlab.measure.bench import timing
shape = timing.SHAPES[{shape}]
attend, _ = timing.{call}
mx.eval(attend(mx.zeros((1, shape.query_heads, 1, shape.head_dim), mx.float16)))
"""


def main(arguments: Sequence[str]) -> int:
    """Run both, and return 1 if a comparison failed; benchmarks run in any case."""
    folder, *options = arguments
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    processes = max(1, (os.cpu_count() or 1) - _LEFT)
    build(_attention(), processes)
    print(f"kernels of benchmarks are built after {time.monotonic() - begin:.0f} s", flush=True)
    found = parity(SUITE, processes)
    told = {"facts": {**facts(), "commit": commit()}, "seconds": round(time.monotonic() - begin), **found}
    write_atomically(out / "parity.json", json.dumps(told, indent=1).encode())
    print(f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped", flush=True)
    benched = cli.main(["bench", "--json", str(out / "bench.json"), *options])
    return 1 if found["failed"] else benched


def _attention() -> list[str]:
    """Return code for each kernel of the benchmarks of attention; MLX's own for quantized keys take a minute."""
    shapes = range(len(SHAPES))
    every: list[tuple[int, float, str]] = [
        *((shape, bits, "turboquant") for shape in shapes for bits in timing.BITS),
        *((shape, timing.FRACTION, "fisherquant") for shape in shapes),
        *((0, timing.METHOD_BITS, name) for name in METHODS if name != "none"),
    ]
    calls = [(0, f"mlx_lm(shape, {timing.TOKENS[0]}, {bits})") for bits in (4, 8)]
    calls += [(shape, f"over_codes(shape, 512, {bits}, {method!r})") for shape, bits, method in every]
    return [_BUILD.format(shape=shape, call=call) for shape, call in calls]


def build(codes: Sequence[str], processes: int) -> None:
    """Run ``codes`` by several processes, each some of them: compiled kernels are on the disk for the benchmarks."""

    def run(own: Sequence[str]) -> None:
        command = [sys.executable, "-c", "\n".join(own)]
        subprocess.run(command, check=True, env=os.environ | _ALONE, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, filter(None, (codes[i::processes] for i in range(processes)))))


def commit() -> str:
    """Return the tested commit."""
    asked = ["git", "rev-parse", "HEAD"]
    return os.environ.get(COMMIT) or subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def parity(suite: Path, processes: int) -> dict[str, Any]:
    """Return numbers of passed and skipped comparisons, and the last lines of failed ones."""
    command = [*PYTEST, "-rA", "--no-fold-skipped", "-n", str(processes), "--dist", "worksteal", str(suite)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | _ALONE)
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if run.returncode and not failed:
        failed = [f"ERROR the suite ended with exit code {run.returncode}: {(lines or run.stderr.splitlines())[-1]}"]
    return {
        "passed": sum(line.startswith("PASSED") for line in lines),
        "skipped": sum(line.startswith("SKIPPED") for line in lines),
        "failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
