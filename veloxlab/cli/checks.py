"""``veloxlab doctor``: whether this installation can do what it should."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from veloxlab.cli.arguments import Commands

MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="check the device, the packages and the model's weights")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(run=show_checks, passes_on="nothing")


def show_checks(options: argparse.Namespace) -> int:
    """Print what the doctor found, as a table or as JSON; status 1 if a check failed."""
    from veloxlab.checkup import doctor

    checks = doctor()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{MARKS[check.status]}  {check.name:<{width}}  {check.detail}")
            if check.hint:
                print(f"      {'':<{width}}  -> {check.hint}")
    return int(any(check.status == "fail" for check in checks))
