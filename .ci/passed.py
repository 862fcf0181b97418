"""Prints how many tests passed; fails where a browser test was skipped, or none ran."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

cases = ElementTree.parse(sys.argv[1]).findall(".//testcase")
browser = [case for case in cases if ".browser." in f".{case.get('classname')}."]
skipped = [case.get("name") for case in browser if case.find("skipped") is not None]
if skipped or not browser:
    sys.exit(f"Browser tests that did not run: {', '.join(map(str, skipped)) or 'all'}")
outcomes = ("failure", "error", "skipped")
print(sum(all(case.find(outcome) is None for outcome in outcomes) for case in cases), "passed")
