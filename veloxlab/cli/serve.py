"""mlx-lm's own commands on a compressed cache, with their own options behind ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from veloxlab.cli.arguments import Commands
from veloxlab.errors import InputError

THEIRS = {"serve": "server", "generate": "generate", "cache-prompt": "cache_prompt"}
"""Our names of the commands, and theirs."""
NUMBERS = {
    "bits": "code bits a value (default: 4)",
    "key_bits": "of keys, if other",
    "value_bits": "of values, if other",
    "sinks": "first tokens kept exact (default: 4)",
    "window": "newest tokens kept exact (default: 64)",
    "max_kv_size": "tokens held at most, older ones are forgotten (default: all)",
}


def add(commands: Commands) -> None:
    """Add the commands."""
    for name, theirs in THEIRS.items():
        parser = commands.add_parser(name, help=f"mlx_lm.{theirs} on a compressed cache, with its options behind ours")
        parser.add_argument("model", help="smollm2-135m, a .gguf file, a folder, or a Hugging Face repo id")
        parser.add_argument("--method", help="how to compress (default: turboquant)")
        parser.add_argument(
            "--plan", type=Path, metavar="FILE", help="a plan that plan.save wrote, in the place of --method"
        )
        parser.add_argument(
            "--calibration",
            type=Path,
            action="append",
            default=[],
            metavar="FILE",
            help="what calibration.save wrote, once for each file; other methods that learn are fitted first",
        )
        for number, words in NUMBERS.items():
            parser.add_argument(f"--{number.replace('_', '-')}", type=int, metavar="N", help=words)
        parser.set_defaults(run=run_theirs, passes_on="unknown")


def run_theirs(options: argparse.Namespace) -> int:
    """Run one of them."""
    from veloxlab.cache.calibration import Calibration
    from veloxlab.cache.plan import Plan
    from veloxlab.serve.commands import Wanted, run

    settings = {name: getattr(options, name) for name in NUMBERS if getattr(options, name) is not None}
    if options.plan is not None and options.method is not None:
        raise InputError("--plan says which method each layer gets: leave out --method.")
    plan = None if options.plan is None else Plan.load(options.plan)
    wanted = Wanted(plan, options.method, settings, [Calibration.load(path) for path in options.calibration])
    run(options.command, THEIRS[options.command], options.model, wanted, options.passed_on)
    return 0
