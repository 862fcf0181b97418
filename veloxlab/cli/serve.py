"""mlx-lm's own commands with a compressed cache; mlx-lm's options are also accepted."""

from __future__ import annotations

import argparse
from pathlib import Path

from veloxlab.cli.arguments import Commands
from veloxlab.errors import InputError

THEIRS = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}
"""Our names of the commands, and theirs."""
NUMBERS = {
    "bits": "code bits per value (default: 4)",
    "key_bits": "code bits of keys, if different",
    "value_bits": "code bits of values, if different",
    "sinks": "number of exact first tokens (default: 4)",
    "window": "number of exact newest tokens (default: 64)",
    "max_kv_size": "maximum number of tokens in the cache; older tokens are dropped (default: no limit)",
}


def add(commands: Commands) -> None:
    """Add the commands."""
    for name, theirs in THEIRS.items():
        words = f"run mlx_lm.{theirs} with a compressed cache"
        parser = commands.add_parser(name, help=words, epilog=f"Options of mlx_lm.{theirs} are also accepted.")
        parser.add_argument("model", help="smollm2-135m, a .gguf file, a folder, or a Hugging Face repo id")
        parser.add_argument("--method", help="compression method (default: turboquant)")
        parser.add_argument(
            "--plan", type=Path, metavar="FILE", help="plan file from plan.save, in the place of --method"
        )
        parser.add_argument(
            "--calibration",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help="file from calibration.save; repeat for more files; a missing calibration is made first",
        )
        for number, meaning in NUMBERS.items():
            parser.add_argument(f"--{number.replace('_', '-')}", type=int, metavar="N", help=meaning)
        parser.set_defaults(run=run_theirs, passes_on="unknown")


def run_theirs(options: argparse.Namespace) -> int:
    """Run one of the commands."""
    from veloxlab.cache.calibration import Calibration
    from veloxlab.cache.plan import Plan
    from veloxlab.serve.commands import Wanted, run

    settings = {name: getattr(options, name) for name in NUMBERS if getattr(options, name) is not None}
    if options.plan is not None and options.method is not None:
        raise InputError("--plan already contains the method of each layer: leave out --method.")
    plan = None if options.plan is None else Plan.load(options.plan)
    wanted = Wanted(plan, options.method, settings, [Calibration.load(path) for path in options.calibration])
    run(options.command, THEIRS[options.command], options.model, wanted, options.passed_on)
    return 0
