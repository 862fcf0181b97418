"""veloxlab with limited memory and CPU time: ``python -m tests.container`` writes ``data/results/container.md``.

Run it in a control group. With systemd: ``systemd-run --scope -p CPUQuota=50% -p MemoryMax=2G uv run python -m
tests.container``. In a container: ``docker run --cpus 0.5 --memory 2g``. With version 1 of control groups: make
a folder in those of ``cpu`` and ``memory``, write ``cpu.cfs_quota_us`` and ``memory.limit_in_bytes`` there, and the
process id of a shell into ``cgroup.procs``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.binder_memory import EVERY, below, peaks
from veloxlab import runtime
from veloxlab.cli.tables import markdown
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "container.json"
TOKENS = (512, 2048)
CLI = (sys.executable, "-m", "veloxlab.cli")
TOUR = "from tests.execute_notebooks import NOTEBOOKS, execute; execute(NOTEBOOKS / '00_tour.ipynb')"
PLANNER = "import veloxlab as vl; print(vl.widgets.MemoryPlanner(layers=30, kv_heads=3, head_dim=64).memory_gb)"


def measured(folder: Path) -> dict[str, Any]:
    """Return output of the doctor and the planner, costs of the tour, and decoding times beside the exact cache."""
    checks = {check["name"]: check["detail"] for check in json.loads(said(*CLI, "doctor", "--json"))}
    tour = watched(sys.executable, "-c", TOUR)
    bench = folder / "bench.json"
    decode = watched(*CLI, "bench", "--only", "decode", "--tokens", *map(str, TOKENS), "--json", str(bench))
    return {
        "memory_limit_bytes": runtime.memory_limit(),
        "cpu_quota": runtime.cpu_quota(),
        "doctor": {name: checks[name] for name in ("device", "memory", "BLAS")},
        "planner_gb": float(said(sys.executable, "-c", PLANNER)),
        "runs": {"tour": tour, "bench": decode},
        "decode": json.loads(bench.read_text())["decode"],
    }


def said(*command: str) -> str:
    """Return the output of a command; raises `subprocess.CalledProcessError` if it fails or is killed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def watched(*command: str) -> dict[str, Any]:
    """Run a command; return its seconds, its status (-9: killed), and the most resident bytes of its processes."""
    begun, most = time.monotonic(), dict[int, int]()
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most |= peaks([process.pid, *below(process.pid)])
            time.sleep(EVERY)
    return {"seconds": time.monotonic() - begun, "status": process.returncode, "peak_bytes": sum(most.values())}


def table(found: dict[str, Any]) -> str:
    """Return the measurements as Markdown."""
    lines = [f"- `veloxlab doctor` says of {name}: {detail}." for name, detail in found["doctor"].items()]
    lines.append(f"- The memory planner offers {found['planner_gb']:.1f} GB.")
    for name, run in found["runs"].items():
        ended = "ends well" if run["status"] == 0 else f"ends with status {run['status']}"
        lines.append(
            f"- The {name} {ended}, in {run['seconds']:.0f} s, with {run['peak_bytes'] / 1e9:.2f} GB resident."
        )
    times = markdown(
        "cache | tokens: | ms a token: | of the exact cache's:",
        "{cache} | {tokens:,} | {milliseconds:.0f} | {ratio:.2f}",
        found["decode"]["rows"],
    )
    limits = f"{found['cpu_quota']:g} cores and {found['memory_limit_bytes'] / 2**30:.1f} GiB"
    heading = (
        f"A control group of {limits}, by `uv run python -m tests.container`. Processes that end well were not killed."
    )
    lines += ["", "Decoding, a model of SmolLM2's shape, under the same limits:", "", times, ""]
    return "\n".join([heading, "", *lines])


def main() -> int:
    """Measure and write; return 1 if there is no limit, or a run failed."""
    if runtime.memory_limit() is None or runtime.cpu_quota() is None:
        print("No control group limits memory and CPU time here: the docstring of this file says how.", file=sys.stderr)
        return 1
    with TemporaryDirectory() as folder:
        found = measured(Path(folder))
    write_atomically(FILE, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(FILE.with_suffix(".md"), table(found).encode())
    print(table(found))
    return int(any(run["status"] for run in found["runs"].values()))


if __name__ == "__main__":
    sys.exit(main())
