"""Damaged files are refused, and failed writes change nothing: a few of each; ``python -m tests.faults`` tries all."""

import json
import re
from pathlib import Path

import pytest

from tests.faults import __main__ as faults
from tests.faults import damage, writes
from tests.faults.kinds import KINDS
from veloxlab import store

FEW = {damage.cut: 12, damage.flipped: 40, writes.without_space: 3}
PROCESSES = {"two writers and a reader": 8, "killed (`kill -9`) while it is written": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_and_no_failed_write_slips_through(kind):
    wrong = {}
    for fault, function in faults.FAULTS.items():
        if fault not in PROCESSES:
            found = faults.tried(kind, fault, FEW.get(function, 1))
            wrong[fault] = [said for said in found if said not in faults.GOOD]
    assert {fault: said for fault, said in wrong.items() if said} == {}


@pytest.mark.parametrize("fault", PROCESSES)
def test_what_other_processes_do_slips_through_nowhere(fault):
    """Of one kind: all are written by the same function."""
    found = faults.tried("unfinished sweep", fault, PROCESSES[fault])
    assert set(found) <= faults.GOOD
    assert found


def test_the_committed_counts_are_of_all_kinds_and_faults_and_none_slipped_through():
    counts = json.loads(faults.FILE.read_text())
    assert list(counts) == list(KINDS)
    assert {fault for own in counts.values() for fault in own} == set(faults.FAULTS)
    assert {said for own in counts.values() for found in own.values() for said in found} <= faults.GOOD
    assert faults.FILE.with_suffix(".md").read_text() == faults.table(counts)


def test_every_format_has_a_kind():
    """A new format of files needs a row in `KINDS`."""
    sources = (Path(store.__file__).parent).rglob("*.py")
    named = {found for file in sources for found in re.findall(r'^FORMAT = "(veloxlab .*)"', file.read_text(), re.M)}
    assert named == {kind.module.FORMAT for kind in KINDS.values()}
