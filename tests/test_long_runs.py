"""Random schedules agree with the model, and live bytes are those held; ``python -m tests.long_runs`` runs long."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.long_runs import CHECKED, DECODED, FAMILIES, FILE, SCHEDULES, STEPS, Schedule, decoded, tables


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "bits", "most"), [("none", 16, 1e-4), ("turboquant", 4, 1e-4)])
def test_a_schedule_of_chunks_trims_batches_files_and_copies_agrees_with_the_model(family, method, bits, most):
    """Within float32 rounding; qwen3_next's states round most."""
    for seed in range(2):
        one = Schedule(family, method, bits, seed)
        one.run(8)
        assert one.worst < most


def test_wrong_logits_of_a_schedule_are_detected():
    one = Schedule("llama", "none", 16, 0)
    one.chunk(0)
    one.sequences[0].cache = one.make()  # as if all tokens were lost
    one.chunk(0)
    assert one.worst > 0.1


@pytest.mark.parametrize("sequences", [1, 3])
def test_live_bytes_are_those_held(sequences):
    # a separate process: here, new entries of bounded look-up tables free small arrays of other tests
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        row = pool.submit(decoded, "llama", sequences, 200, {}, 50).result()
    # zeros for a few tokens that all caches share, used when buffers grow
    assert 0 <= row["live_bytes"] - row["held_bytes"] < 4_000


def test_the_committed_runs_are_complete_and_within_their_limits():
    results = json.loads(FILE.read_text())
    assert set(results) == {*DECODED, *CHECKED}
    for name in CHECKED:
        assert results[name]["schedules"] == SCHEDULES
        assert max(results[name]["worst"].values()) < 1e-4
    for name in DECODED:
        assert results[name]["steps"] == STEPS == 20_000
        assert abs(results[name]["live_beyond"]) < 0.02
        assert abs(results[name]["resident_slope"]) < 100  # bytes for each step: a page for 40 steps
    assert FILE.with_suffix(".md").read_text() == tables(results)
