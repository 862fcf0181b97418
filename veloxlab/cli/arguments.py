"""Arguments and messages that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model(parser: argparse.ArgumentParser) -> None:
    """What to load."""
    parser.add_argument("--model", default="smollm2-135m", help="what to load (default: %(default)s)")


def add_text(parser: argparse.ArgumentParser, *, tokens: int, windows: int) -> None:
    """How much text a model reads."""
    parser.add_argument("--tokens", type=int, default=tokens, help="length of a stretch of text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=windows, help="number of stretches (default: %(default)s)")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write to (default: %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The one file that results go to."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")


def say(done: int, total: int, label: str) -> None:
    """Print how far the work has come, where it is in no output's way."""
    print(f"{done} of {total}: {label}", file=sys.stderr)
