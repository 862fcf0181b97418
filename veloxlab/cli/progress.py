"""What a long command says while it works."""

from __future__ import annotations

import sys


def say(done: int, total: int, label: str) -> None:
    """Print how far the work has come, where it is in no output's way."""
    print(f"{done} of {total}: {label}", file=sys.stderr)
