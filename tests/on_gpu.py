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
    *("-p", "no:cacheprovider", "-p", "no:nbval"),
    "-o",
    "addopts=",
    "-m",
    "gpu",
)
_LEFT = 2  # processors without a compiling process
_SHARES = 2  # of each process, one after the other: some tests take much longer than others
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
    found = parity(tests_of(SUITE), processes)
    told = {"facts": {**facts(), "commit": commit()}, "seconds": round(time.monotonic() - begin), **found}
    write_atomically(out / "parity.json", json.dumps(told, indent=1).encode())
    print(f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped", flush=True)
    build(_attention(), processes)
    print(f"kernels of benchmarks are built after {time.monotonic() - begin:.0f} s", flush=True)
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


def tests_of(suite: Path) -> list[str]:
    """Return the ids of all comparisons."""
    listed = subprocess.run([*PYTEST, "--collect-only", str(suite)], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if "::" in line]


def parity(tests: Sequence[str], processes: int) -> dict[str, object]:
    """Return numbers of passed and skipped comparisons, and the last lines of failed ones."""
    count = _SHARES * processes
    shares = [share for share in (tests[i::count] for i in range(count)) if share]
    with ThreadPoolExecutor(processes) as pool:
        outcomes = list(pool.map(_outcomes, shares))
    lines = [line for outcome in outcomes for line in outcome]
    return {
        "passed": sum(line.startswith("PASSED") for line in lines),
        "skipped": sum(line.startswith("SKIPPED") for line in lines),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }


def _outcomes(tests: Sequence[str]) -> list[str]:
    """Return a line for each test, two if its teardown failed, and another if the process died before the end."""
    command, env = [*PYTEST, "-rA", "--no-fold-skipped", *tests], os.environ | _ALONE
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = [line for line in run.stdout.splitlines() if line.startswith(("PASSED", "SKIPPED", "FAILED", "ERROR"))]
    lost = len(tests) - len({line.split(" ", 1)[1].partition(" - ")[0] for line in lines})
    died = f"ERROR {lost} tests of this process gave no outcome (exit code {run.returncode})"
    return [*lines, died] if lost else lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
