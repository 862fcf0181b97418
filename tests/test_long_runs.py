"""Random schedules give what the model says, and live bytes are those held; ``python -m tests.long_runs`` runs long."""

import json

import pytest

from tests import long_runs
from tests.long_runs import BOUNDED, CHECKED, DECODED, FAMILIES, FILE, SCHEDULES, Schedule, decoded, tables


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "bits", "most"), [("none", 16, 1e-4), ("turboquant", 4, 1e-4)])
def test_a_schedule_of_chunks_trims_batches_files_and_copies_says_the_same(family, method, bits, most):
    """To the rounding of float32; qwen3_next's states round most."""
    for seed in range(2):
        one = Schedule(family, method, bits, seed)
        one.run(8)
        assert one.worst < most


def test_what_a_schedule_says_is_compared():
    one = Schedule("llama", "none", 16, 0)
    one.chunk(0)
    one.sequences[0].cache = one.make()  # as if all were forgotten
    one.chunk(0)
    assert one.worst > 0.1


@pytest.mark.parametrize("sequences", [1, 3])
def test_live_bytes_are_those_held(sequences):
    row = decoded("llama", sequences, 300, {}, 100)
    # tables of two layers' codecs, and what the kernels keep
    assert abs(row["live_bytes"] - row["held_bytes"]) < 32_000 * sequences


def test_the_committed_runs_are_whole_and_within_their_bars():
    results = json.loads(FILE.read_text())
    assert set(results) == {*DECODED, *CHECKED}
    for name in CHECKED:
        assert results[name]["schedules"] == SCHEDULES
        assert max(results[name]["worst"].values()) < 1e-4
    for name in DECODED:
        beyond = results[name]["live_bytes"] - results[name]["held_bytes"]
        assert abs(beyond) < max(0.02 * results[name]["held_bytes"], 64_000)  # the tables of a cache that stays small
    assert results[f"decode, at most {BOUNDED} tokens"]["resident_slope"] < 1  # bytes a step
    assert FILE.with_suffix(".md").read_text() == tables(results)
    assert long_runs.STEPS == 20_000
