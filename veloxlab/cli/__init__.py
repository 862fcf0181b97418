"""The command ``veloxlab``: alone it opens JupyterLab at the tour; ``veloxlab doctor`` checks the installation.

No module here imports MLX before a command needs it: the doctor must run where MLX is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from veloxlab.cli import quality, serve, speed, start
from veloxlab.cli.start import open_lab
from veloxlab.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 is success, 1 a failed check, 2 bad input."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, unknown = parser.parse_known_args(words[:end])
    behind = words[end + 1 :]
    options.passed_on = [*unknown, *behind]
    if unknown and options.passes_on != "unknown":
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if behind and options.passes_on == "nothing":
        parser.error(f"{options.command} accepts no arguments after --: leave out {' '.join(words[end:])}")
    try:
        status: int = options.run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="veloxlab",
        description="Without a command, open JupyterLab at the tour notebook. Arguments after -- go to JupyterLab.",
    )
    parser.add_argument("--version", action="version", version=f"veloxlab {version('veloxlab')}")
    parser.set_defaults(run=open_lab, passes_on="behind")
    commands = parser.add_subparsers(title="commands", dest="command")
    for room in (start, quality, speed, serve):
        room.add(commands)
    return parser
