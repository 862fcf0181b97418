"""Other projects' caches: rows equal those of the same cache in this process; exact tokens in a call are found."""

import shutil
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import polars as pl
import pytest
from mlx_lm.models.cache import QuantizedKVCache

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab import offline
from veloxlab.cli import measurements, tables
from veloxlab.measure import in_peer, peers
from veloxlab.measure.peers import PEERS, Peer, compare_peers, environment

TEXT = "the keys of a window and the values beside them, " * 6
WINDOWS = {"text": TEXT, "tokens": 96, "windows": 2}
TOY = (Peer("toy", "1", (4,)),)


def quantized(model, bits=4):
    return [QuantizedKVCache(group_size=64, bits=bits) for _ in model.layers]


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Use this process as a peer's environment, and the caches set here as its caches."""
    monkeypatch.setattr(peers, "PEERS", TOY)
    monkeypatch.setattr(peers, "environment", lambda _: tmp_path / "bin" / "python")
    monkeypatch.setattr(peers, "_run", lambda command, _: in_peer.main(Path(command[-1])))
    return partial(monkeypatch.setitem, in_peer.CACHES, "toy")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def test_a_row_is_that_of_the_same_cache_in_this_process(toys, model):
    toys(quantized)
    frame, left_out = compare_peers(model, Letters(), **WINDOWS)
    own = vl.measure.fidelity_to(vl.measure.reference(model, Letters(), **WINDOWS), quantized)
    assert left_out == {}
    assert (frame["name"].item(), frame["mode"].item()) == ("toy 4 bit", "oneshot")
    for column in ("kl_mean", "kl_max", "perplexity"):
        assert frame[column].item() == pytest.approx(own[column].item(), rel=1e-4, abs=1e-7)
    assert frame["fp16_bytes"].item() == own["fp16_bytes"].item()
    # 4 bits, and a scale and a bias of the model's float32 for each 64 values
    assert frame["held_bits"].item() == 4 + 2 * 32 / 64
    assert frame["table_bytes"].item() == 0
    assert "| toy 4 bit |" in tables.peers_table(frame)


def test_a_cache_with_exact_tokens_within_a_call_is_read_token_by_token(toys, model):
    toys(lambda model, bits: vl.make_cache(model, "turboquant", bits=bits, sinks=0, window=0, chunk="exact"))
    frame, _ = compare_peers(model, Letters(), **WINDOWS)
    assert frame["mode"].item() == "decode"
    assert frame["kl_mean"].item() > 1e-6


def test_a_cache_that_cannot_be_made_is_left_out_with_its_reason(toys, model):
    def missing(model, bits):
        raise ValueError(f"no codebook of {bits} bits")

    toys(missing)
    frame, left_out = compare_peers(model, Letters(), **WINDOWS)
    assert frame.is_empty()
    assert left_out == {"toy 4 bit": "ValueError: no codebook of 4 bits"}


def test_a_model_that_differs_from_ours_is_detected(toys, model, monkeypatch):
    toys(quantized)
    monkeypatch.setattr(peers, "save_model", lambda _, folder: SAVE(tiny("llama", seed=1), folder))
    _, left_out = compare_peers(model, Letters(), **WINDOWS)
    assert "predictions of the exact cache differ" in left_out["toy 4 bit"]


SAVE = peers.save_model


def test_all_memory_that_a_cache_reaches_is_counted_once():
    one, two = mx.zeros((2, 300, 4), mx.bfloat16) + 1, np.zeros(5, np.uint8)
    held = Holder(one, [two, {"again": one, "part": one[:, :200]}])
    assert in_peer.live_bytes([held, held, mx.array([])]) == one.nbytes + two.nbytes


class Holder:
    def __init__(self, *held):
        self.held = held


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.package)
def test_each_peer_has_its_cache(peer):
    assert peer.package in in_peer.CACHES


def test_the_message_on_a_failed_environment_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "kept_in", lambda _: tmp_path)
    monkeypatch.setenv(offline.SWITCH, "1")
    with pytest.raises(vl.InputError, match="is not installed: unset it once"):
        environment(PEERS[0])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(vl.InputError, match="pip install uv"):
        environment(PEERS[0])


def test_the_message_on_a_failed_command_has_the_reason():
    with pytest.raises(vl.InputError, match="failed: it is not so"):
        peers._run([sys.executable, "-c", "import sys; sys.exit('it is not so')"])


def rows(*named):
    return pl.DataFrame(named, schema=["name", "held_bits", "held_bytes", "kl_mean"], orient="row")


def test_each_peer_is_paired_with_our_least_loss_in_no_more_bytes():
    theirs = rows(("peer 4 bit", 4, 400, 0.2), ("peer 2 bit", 2, 200, 0.5), ("peer 1 bit", 1, 99, 2.0))
    ours = rows(("a 2 bit", 2, 200, 0.4), ("b 2 bit", 2, 201, 0.1), ("c 1 bit", 1, 100, 0.8))
    found = peers.beside(theirs, ours)
    assert found.select("name", "name_ours", "ratio").rows() == [
        ("peer 2 bit", "a 2 bit", 0.8),
        ("peer 4 bit", "b 2 bit", 0.5),
    ]


def test_the_committed_rows_are_of_these_peers_and_lose_more_than_our_best_up_to_6_bits(monkeypatch, tmp_path):
    path = vl.texts.shipped_folder("data") / "results" / "compare_smollm2-135m_peers.parquet"
    frame = pl.read_parquet(path)
    assert set(frame["name"].str.split(" ").list.first()) == {peer.package for peer in PEERS}
    told = []
    monkeypatch.setattr(measurements, "_tell", lambda _, table: told.append(table))
    monkeypatch.setattr(measurements, "write_atomically", lambda *_: None)
    monkeypatch.setattr(tables, "beside_table", lambda found: told.append(found) or BESIDE(found))
    measurements.tell_peers(path.with_suffix(""), frame, {})
    beside, text = told
    assert path.with_suffix(".md").read_text() == f"{text}\n"
    few = beside.filter(pl.col("held_bits") < 6)
    assert few.height == 12
    assert set(few["name_ours"].str.split(" ").list.first()) == {"fisherquant"}
    assert few["ratio"].max() < 0.34  # "a third", says the README


BESIDE = tables.beside_table
