"""Prints how many tests passed; fails where one that needs a browser or a compiler was skipped, or none of them ran."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

NEEDY = (".browser.", "_on_host.", ".test_attention_kernels.")  # what .ci/run installs Chromium, g++ and clang for

cases = ElementTree.parse(sys.argv[1]).findall(".//testcase")
for kind in NEEDY:
    these = [case for case in cases if kind in f".{case.get('classname')}."]
    skipped = [case.get("name") for case in these if case.find("skipped") is not None]
    if skipped or not these:
        sys.exit(f"Tests of {kind.strip('._')} that did not run: {', '.join(map(str, skipped)) or 'all'}")
outcomes = ("failure", "error", "skipped")
print(sum(all(case.find(outcome) is None for outcome in outcomes) for case in cases), "passed")
