"""The command ``veloxlab``: without arguments it opens JupyterLab at the tour; `COMMANDS` are all others.

No module here imports MLX before a command needs it: the doctor must run if MLX is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import veloxlab
from veloxlab import texts
from veloxlab.checks import number_of_bits, number_of_tokens
from veloxlab.cli import measurements, results, times
from veloxlab.errors import InputError
from veloxlab.store import make_folder, write_atomically

TOUR = "00_tour.ipynb"
COPY_FOLDER = Path("veloxlab-notebooks")
OF_MLX_LM = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}  # our names, and mlx-lm's
MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
TASKS = ("copy", "lookup", "arithmetic", "passkey")
Argument = tuple[str, dict[str, Any]]  # name, and other arguments of `argparse`


def open_lab(passed_on: Sequence[str]) -> int:
    """Open JupyterLab at the tour notebook; the server replaces this process."""
    if find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed; run `uv pip install jupyterlab`.")
    # JupyterLab also prints this address, for a browser on another machine
    start = f"--LabApp.default_url=/lab/tree/{TOUR}"
    arguments = [sys.executable, "-m", "jupyterlab", str(_notebooks()), start, *passed_on]
    if os.geteuid() == 0 and "--allow-root" not in arguments:
        print("This process runs as root, so JupyterLab starts with --allow-root.", file=sys.stderr)
        arguments.append("--allow-root")
    os.execv(sys.executable, arguments)


def _notebooks() -> Path:
    """Return a folder with copies of the notebooks, so that a clone's tracked files do not change."""
    folder = texts.shipped_folder("notebooks")
    make_folder(COPY_FOLDER)
    for notebook in sorted(folder.glob("*.ipynb")):
        copy = COPY_FOLDER / notebook.name
        if not copy.exists():  # a user's changes are never overwritten
            write_atomically(copy, notebook.read_bytes())
    print(f"The notebooks are in {COPY_FOLDER.resolve()}.", file=sys.stderr)
    return COPY_FOLDER.resolve()


def show_checks(as_json: bool) -> int:
    """Print the checks as a table or as JSON; return status 1 if a check failed."""
    from veloxlab.checkup import doctor

    checks = doctor()
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint:
                print(f"      {'':<{width}}  -> {check.hint}")
    return int(any(check.status == "fail" for check in checks))


def run_mlx_lm(command: str, **given: Any) -> None:
    """Run a command of mlx-lm with a compressed cache."""
    from veloxlab.serve.commands import run

    run(command, OF_MLX_LM[command], **given)


def write_report(**given: Any) -> None:
    """Measure a plan's cache, and write a page about it."""
    from veloxlab.cli.report import write_report

    write_report(**given)


def _one(name: str, words: str, kind: Callable[[str], Any] = str, default: Any = None, **more: Any) -> Argument:  # noqa: ANN401
    """An argument of one value; its help names the default."""
    said = " ".join(map(str, default)) if isinstance(default, list) else default
    return name, {"type": kind, "default": default, "help": f"{words} (default: {said})" if said else words, **more}


_many = partial(_one, nargs="+")


def _text(tokens: int, windows: int) -> tuple[Argument, Argument]:
    return (
        _one("--tokens", "tokens in a window of text", int, tokens),
        _one("--windows", "number of windows of text", int, windows),
    )


def _layers(word: str) -> tuple[int, ...]:
    try:
        return () if word == "none" else tuple(map(int, word.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word} is not a list of layers: give 0 or 0,-1, or none") from None


def _tokens(word: str) -> int:
    try:
        return number_of_tokens(word)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


MODEL = _one("--model", "name, .gguf file, folder or repo id", default="smollm2-135m")
OUT = _one("--out", "output folder", Path, Path("results"))
FILE = _one("--json", "output file for the results", Path, metavar="FILE", dest="file")
CACHE = (
    _one("model", "smollm2-135m, a .gguf file, a folder, or a Hugging Face repo id"),
    _one("--method", "compression method (default: turboquant)"),
    _one("--plan", "plan file from plan.save, instead of --method", Path, metavar="FILE"),
    _one("--calibration", "file from calibration.save; may be repeated", Path, [], action="append", metavar="FILE"),
    _one("--bits", "code bits per value (default: 4)", number_of_bits, metavar="N"),
    _one("--key-bits", "code bits of keys, if different", number_of_bits, metavar="N"),
    _one("--value-bits", "code bits of values, if different", number_of_bits, metavar="N"),
    _one("--sinks", "number of exact first tokens (default: 4)", int, metavar="N"),
    _one("--window", "number of exact newest tokens (default: 64)", int, metavar="N"),
    _one("--max-kv-size", "maximum number of tokens in the cache (default: no limit)", int, metavar="N"),
)

COMMANDS: dict[str, tuple[Any, ...]] = {
    "doctor": (
        "check the device, the packages and the model's weights",
        show_checks,
        ("--json", {"action": "store_true", "help": "print the checks as JSON", "dest": "as_json"}),
    ),
    "advise": (
        "recommend a cache for a model, a context and a memory",
        measurements.advise_cache,
        _one("model", "smollm2-135m, a .gguf file, a config.json or its folder, a cached repo id, or a size: 8B"),
        _one("--context", "tokens of each sequence; 32k is 32768", _tokens, 32_768),
        _one("--memory", 'of the machine, such as "16 GB"; a plain number is in GB (default: this device\'s)'),
        _one("--goal", "what the text is for: chat, retrieval or draft", default="chat"),
        _one("--weights", 'size of the weights, such as "4.5 GB" or 4.5 (default: from the model)'),
        _one("--weight-bits", "bits of a weight of a configuration", int, 4),
        _one("--batch", "number of sequences", int, 1),
    ),
    "report": (
        "measure the cache of a plan, and write a page about it that needs no network",
        write_report,
        CACHE[0],
        _one("--plan", "plan file from plan.save", Path, metavar="FILE", required=True),
        CACHE[3],
        *_text(512, 4),
        _one("--seed", "seed of what is calibrated now; codes have that of the plan", int, 0),
        _many("--tasks", f"tasks to evaluate too: {', '.join(TASKS)}", default=[], choices=TASKS),
        _one("--questions", "questions of each task", int, 16),
        _one("--out", "the page", Path, Path("report.html"), metavar="FILE"),
    ),
    "evaluate": (
        "ask questions through the exact and a compressed cache",
        measurements.ask_tasks,
        *CACHE[:-1],
        _many("--tasks", "names of tasks; lm_eval:NAME for one of lm-evaluation-harness", default=[*TASKS]),
        _one("--own", "your own questions: a file of JSON lines", Path, None, metavar="FILE"),
        _one("--questions", "questions of each task", int, 32),
        _one("--context", "tokens before a question", _tokens, 512),
    ),
    "compare": (
        "measure quality, memory and time of all caches on WikiText-2",
        measurements.compare_caches,
        MODEL,
        _many("--methods", "method ids (default: all)"),
        _one("--sinks", "first tokens that our caches keep exact; times need 0", int, 0),
        _one("--seed", "seed of what is random in our codes or their calibration", int, 0),
        (
            "--peers",
            {"action": "store_true", "help": "measure other projects' caches, each in its own environment"},
        ),
        ("--times", {"action": "store_true", "help": "measure only the times of an earlier comparison again"}),
        *_text(512, 3),
        OUT,
    ),
    "sweep": (
        "compare uniform bits with RateQuant in equal bytes",
        measurements.sweep_bits,
        MODEL,
        _many("--bits", "average code bits", float, [2.0, 2.5, 3.0, 3.5, 4.0]),
        _many("--by", "kinds of sensitivity", default=["gradient", "key_norm"]),
        *_text(512, 8),
        _one("--sequences", "number of texts for sensitivities", int, 8),
        OUT,
    ),
    "search": (
        "search for the Pareto front of bytes and divergence",
        measurements.search_front,
        MODEL,
        _many("--methods", "method ids (default: all methods without calibration)"),
        _many("--bits", "bits of keys and values", number_of_bits, [2, 3, 4]),
        _many("--sinks", "exact first tokens", int, [0, 4]),
        _many("--window", "exact newest tokens", int, [0]),
        _many("--protected", "exact layers, such as 0,-1 (default: none 0)", _layers, [(), (0,)]),
        _one("--most-bytes", "maximum bytes per token", float, dest="most_bytes_per_token"),
        _one("--most-kl", "maximum KL divergence in nats", float),
        *_text(192, 8),
        _one("--workers", "number of processes", int, 1),
        OUT,
    ),
    "bench": (
        "time attention, encoding and decoding on this device",
        times.time_kernels,
        FILE,
        _many("--tokens", "context lengths (default: 4096 32768 131072; on a CPU 512 2048 8192 32768)", int),
        _many("--only", "measure only these parts; keep the others of FILE", choices=times.PARTS, nargs="*"),
        _many("--caches", "compressed caches to decode with on a CPU, as METHOD:BITS (default: turboquant:4)"),
        _one("--against", "results of an earlier run: list the ratios that moved beyond noise", Path, metavar="FILE"),
        ("--busy", {"action": "store_true", "help": "on a CPU, decode also while another process uses one core"}),
    ),
    "memory": (
        "measure peak memory and time per token, by length of text",
        times.measure_lengths,
        MODEL,
        ("--random", {"action": "store_true", "help": "random weights in the model's shape"}),
        _many("--tokens", "text lengths", int, [1024, 2048, 4096, 8192, 16384]),
        _many("--layer-tokens", "lengths for one layer of a 7B model", int, [], nargs="*"),
        _many("--quantized", "bits of mlx-lm's own quantized cache", int, [4, 8], nargs="*"),
        _one("--quantized-upto", "maximum length for mlx-lm's cache", int, 16384, metavar="TOKENS"),
        FILE,
    ),
    "results": (
        "list the sources of all figures in the README and the notebooks, or measure all again",
        results.show_results,
        ("--check", {"action": "store_true", "help": "list all figures; status 1 if one has no source"}),
        ("--costs", {"action": "store_true", "help": "list the commands of --all and their CPU time"}),
        _one(
            "--all",
            "run all commands that measure (hours: see --costs), or only those that write these files",
            str,
            nargs="*",
            metavar="FILE",
            dest="every",
        ),
    ),
    **{
        name: (f"run mlx_lm.{theirs} with a compressed cache", partial(run_mlx_lm, name), *CACHE)
        for name, theirs in OF_MLX_LM.items()
    },
}
"""By name: a line of help, the function that gets the arguments by name, and the arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 is success, 1 a failed check, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="veloxlab",
        description="Without a command, open JupyterLab at the tour notebook. Arguments after -- go to JupyterLab.",
    )
    parser.add_argument("--version", action="version", version=f"veloxlab {veloxlab.__version__}")  # type: ignore[attr-defined]
    commands = parser.add_subparsers(title="commands", dest="command")
    for command, (about, _, *arguments) in COMMANDS.items():
        also = f"Options of mlx_lm.{OF_MLX_LM[command]} are also accepted." if command in OF_MLX_LM else None
        own = commands.add_parser(command, help=about, epilog=also)
        for argument, settings in arguments:
            own.add_argument(argument, **settings)

    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    options, unknown = parser.parse_known_args(words[:end])
    behind, given = words[end + 1 :], vars(options)
    name = given.pop("command")
    of_mlx_lm = name in OF_MLX_LM
    if unknown and not of_mlx_lm:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if behind and name and not of_mlx_lm:
        parser.error(f"{name} accepts no arguments after --: leave out {' '.join(words[end:])}")
    passed_on = {"passed_on": [*unknown, *behind]} if of_mlx_lm or not name else {}
    try:
        return int((COMMANDS[name][1] if name else open_lab)(**given, **passed_on) or 0)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
