"""Try all faults of all kinds of files, or of some: ``python -m tests.faults [KIND ...]``.

Counts are written to ``data/results/faults.json`` one by one, with a table in another file. The status is 1 if a fault
is not detected.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults import damage, writes
from tests.faults.kinds import KINDS
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "faults.json"
FAULTS = {**damage.DAMAGES, **writes.WRITES}
GOOD = damage.GOOD | writes.GOOD
ALL = 10**9  # cuts
AMOUNTS = {damage.cut: ALL, damage.flipped: 2000, writes.without_space: 64, writes.two_writers: 200, writes.killed: 200}
"""How often a fault is tried; 1 for a fault without variants."""
Counts = dict[str, dict[str, dict[str, int]]]


def tried(kind: str, fault: str, amount: int, seed: int = 0) -> Counter[str]:
    """Return the outcomes of one fault of one kind of file."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)  # another user can read it, and cannot write `folder`
        folder = Path(name) / "files"
        folder.mkdir()
        path = folder / f"file{KINDS[kind].suffix}"
        path.write_bytes(damage.content(kind))
        return Counter(FAULTS[fault](KINDS[kind], path, random.Random(seed), amount))


def table(counts: Counts) -> str:
    """Return the counts as Markdown: a row for each fault, a column for each kind."""
    kinds = [kind for kind in KINDS if kind in counts]
    lines = [
        "What came of faults of files that veloxlab writes, by `uv run python -m tests.faults`",
        "",
        f"| fault | {' | '.join(kinds)} |",
        f"|---|{'---|' * len(kinds)}",
    ]
    for fault in FAULTS:
        cells = [
            ", ".join(f"{count:,} {said}" for said, count in counts[kind].get(fault, {}).items()) for kind in kinds
        ]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(kinds: list[str]) -> int:
    """Try all faults of ``kinds``; return 1 if there is a wrong outcome."""
    counts: Counts = json.loads(FILE.read_text()) if FILE.exists() else {}
    for kind in kinds or KINDS:
        counts[kind] = {}
        for fault, function in FAULTS.items():
            found = tried(kind, fault, AMOUNTS.get(function, 1))
            print(f"{kind}, {fault}: {dict(found)}", flush=True)
            counts[kind][fault] = dict(sorted(found.items()))
            write_atomically(FILE, (json.dumps(counts, indent=1) + "\n").encode())
            write_atomically(FILE.with_suffix(".md"), table(counts).encode())
    wrong = [said for own in counts.values() for outcomes in own.values() for said in outcomes if said not in GOOD]
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
