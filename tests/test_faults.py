"""Damaged files are refused, and failed writes change nothing: a few cases; ``python -m tests.faults`` tries all."""

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
def test_every_damage_and_every_failed_write_is_detected(kind):
    wrong = {}
    for fault, function in faults.FAULTS.items():
        if fault not in PROCESSES:
            found = faults.tried(kind, fault, FEW.get(function, 1))
            wrong[fault] = [said for said in found if said not in faults.GOOD]
    assert {fault: said for fault, said in wrong.items() if said} == {}


@pytest.mark.parametrize("fault", PROCESSES)
def test_every_change_by_other_processes_is_detected(fault):
    """For one kind of file: the same function writes all of them."""
    found = faults.tried("unfinished sweep", fault, PROCESSES[fault])
    assert set(found) <= faults.GOOD
    assert found


def test_the_committed_counts_cover_all_kinds_and_faults_and_all_were_detected():
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
