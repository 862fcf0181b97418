"""The command ``veloxlab``: alone it opens JupyterLab at the tour; `COMMANDS` are all others.

No module here imports MLX before a command needs it: the doctor must run where MLX is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from veloxlab.cli import quality, speed, start
from veloxlab.errors import InputError

Arguments = dict[str, dict[str, Any]]  # what `argparse` takes, by name


@dataclass(frozen=True)
class Command:
    """One command: its line of help, its arguments, what runs it, and which unknown words it passes on."""

    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: Arguments
    passes_on: Literal["nothing", "unknown"] = "nothing"
    epilog: str = ""


def _many(kind: type, default: list[Any] | None, words: str, nargs: str = "+") -> dict[str, Any]:
    return {"type": kind, "nargs": nargs, "default": default, "help": words}


def _text(tokens: int, windows: int) -> Arguments:
    return {
        "--tokens": {"type": int, "default": tokens, "help": "tokens in a window of text (default: %(default)s)"},
        "--windows": {"type": int, "default": windows, "help": "number of windows of text (default: %(default)s)"},
    }


def _of_mlx_lm(theirs: str) -> Command:
    """A command of mlx-lm with a compressed cache."""
    numbers = {f"--{n.replace('_', '-')}": {"type": int, "metavar": "N", "help": h} for n, h in start.NUMBERS.items()}
    arguments: Arguments = {
        "model": {"help": "smollm2-135m, a .gguf file, a folder, or a Hugging Face repo id"},
        "--method": {"help": "compression method (default: turboquant)"},
        "--plan": {"type": Path, "metavar": "FILE", "help": "plan file from plan.save, in the place of --method"},
        "--calibration": {
            "type": Path,
            "action": "append",
            "default": [],
            "metavar": "FILE",
            "help": "file from calibration.save; repeat for more files; a missing calibration is made first",
        },
        **numbers,
    }
    epilog = f"Options of mlx_lm.{theirs} are also accepted."
    return Command(f"run mlx_lm.{theirs} with a compressed cache", start.run_mlx_lm, arguments, "unknown", epilog)


MODEL = {"--model": {"default": "smollm2-135m", "help": "name, .gguf file, folder or repo id (default: %(default)s)"}}
OUT = {"--out": {"type": Path, "default": Path("results"), "help": "output folder (default: %(default)s)"}}
JSON = {"--json": {"type": Path, "metavar": "FILE", "help": "output file for the results"}}
LENGTHS = [1024, 2048, 4096, 8192, 16384]

COMMANDS = {
    "doctor": Command(
        "check the device, the packages and the model's weights",
        start.show_checks,
        {"--json": {"action": "store_true", "help": "print the checks as JSON"}},
    ),
    "compare": Command(
        "measure quality, memory and time of all caches on WikiText-2",
        quality.compare_caches,
        MODEL | _text(512, 3) | OUT,
    ),
    "sweep": Command(
        "compare uniform bits with RateQuant in equal bytes",
        quality.sweep_bits,
        {
            **MODEL,
            "--bits": _many(float, None, "average code bits (default: 2 2.5 3 3.5 4)"),
            "--by": _many(str, ["gradient", "key_norm"], "kinds of sensitivity (default: gradient key_norm)"),
            **_text(512, 8),
            "--sequences": {"type": int, "default": 8, "help": "texts for sensitivities (default: %(default)s)"},
            **OUT,
        },
    ),
    "search": Command(
        "search for the Pareto front of bytes and divergence",
        quality.search_front,
        {
            **MODEL,
            "--methods": _many(str, None, "method ids (default: all methods without calibration)"),
            "--bits": _many(int, [2, 3, 4], "bits of keys and values (default: 2 3 4)"),
            "--sinks": _many(int, [0, 4], "exact first tokens (default: 0 4)"),
            "--window": _many(int, [0], "exact newest tokens (default: 0)"),
            "--protected": _many(str, ["none", "0"], "exact layers, such as 0,-1 (default: none 0)"),
            "--most-bytes": {"type": float, "help": "maximum bytes per token (default: no limit)"},
            "--most-kl": {"type": float, "help": "maximum KL divergence in nats (default: no limit)"},
            **_text(192, 8),
            "--workers": {"type": int, "default": 1, "help": "number of processes (default: %(default)s)"},
            **OUT,
        },
    ),
    "bench": Command(
        "time attention, encoding and decoding on this device",
        speed.time_kernels,
        {
            **JSON,
            "--tokens": _many(int, None, "context lengths (default: 4096 32768 131072)"),
            "--only": {**_many(str, None, "measure only these; keep the others of FILE"), "choices": speed.PARTS},
        },
    ),
    "memory": Command(
        "measure peak memory and time per token, by length of text",
        speed.measure_lengths,
        {
            **MODEL,
            "--random": {"action": "store_true", "help": "random weights in the model's shape"},
            "--tokens": _many(int, LENGTHS, "text lengths"),
            "--layer-tokens": _many(int, [], "lengths for one layer of a 7B model", "*"),
            "--quantized": _many(int, [4, 8], "bits of mlx-lm's own quantized cache", "*"),
            "--quantized-upto": {
                "type": int,
                "default": LENGTHS[-1],
                "metavar": "TOKENS",
                "help": "maximum length for mlx-lm's cache",
            },
            **JSON,
        },
    ),
    **{name: _of_mlx_lm(theirs) for name, theirs in start.OF_MLX_LM.items()},
}


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
    parser.set_defaults(run=start.open_lab, passes_on="behind")
    commands = parser.add_subparsers(title="commands", dest="command")
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.help, epilog=command.epilog)
        for argument, settings in command.arguments.items():
            own.add_argument(argument, **settings)
        own.set_defaults(run=command.run, passes_on=command.passes_on)
    return parser
