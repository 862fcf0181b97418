"""The committed results of `tests.container` in half a core and 2 GB; it refuses to measure without limits."""

import json

import pytest

from tests import container
from veloxlab import runtime


def test_the_committed_run_stayed_within_its_limits():
    found = json.loads(container.FILE.read_text())
    assert (found["cpu_quota"], found["planner_gb"]) == (0.5, round(found["memory_limit_bytes"] / 1e9, 1))
    assert {run["status"] for run in found["runs"].values()} == {0}
    assert max(run["peak_bytes"] for run in found["runs"].values()) < found["memory_limit_bytes"]
    assert container.FILE.with_suffix(".md").read_text() == container.table(found)


@pytest.mark.parametrize("missing", ["memory_limit", "cpu_quota"])
def test_without_a_limit_nothing_is_measured(monkeypatch, capsys, missing):
    monkeypatch.setattr(runtime, "memory_limit", lambda: 2 * 10**9)
    monkeypatch.setattr(runtime, "cpu_quota", lambda: 0.5)
    monkeypatch.setattr(runtime, missing, lambda: None)
    monkeypatch.setattr(container, "measured", pytest.fail)
    assert container.main() == 1
    assert "No control group limits memory and CPU time" in capsys.readouterr().err
