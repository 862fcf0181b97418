"""Arguments and messages that several commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the option for the model."""
    parser.add_argument(
        "--model", default="smollm2-135m", help="name, .gguf file, folder or repo id (default: %(default)s)"
    )


def add_text(parser: argparse.ArgumentParser, *, tokens: int, windows: int) -> None:
    """Add the options for the amount of text."""
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens in a window of text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=windows, help="number of windows of text (default: %(default)s)")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the option for the output folder."""
    parser.add_argument("--out", type=Path, default=Path("results"), help="output folder (default: %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for the output file."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="output file for the results")


def say(done: int, total: int, label: str) -> None:
    """Print the progress to standard error, which keeps standard output free for results."""
    print(f"{done} of {total}: {label}", file=sys.stderr)
