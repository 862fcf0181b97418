"""The cache types of other projects follow their definitions, and rows of experiments mean what they state."""

from __future__ import annotations

import json
from dataclasses import asdict

import gguf
import mlx.core as mx
import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests import surprises_in_use as in_use
from tests import surprises_results as results
from tests.cache_types import WIDTHS, codec, registered
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.measure.generation import Reader
from veloxlab.mlxlm.probe import own_cache
from veloxlab.views import bit_plane, plane_caption

DIM = 64
X = np.random.default_rng(0).standard_t(4, (1, 2, 50, DIM)).astype(np.float32)
X[0, 0, 3] = 0
GGML = {"q8_0": "Q8_0", "q5_1": "Q5_1", "q4_0": "Q4_0"}
TRUE_BITS = {"q8_0": 8.5, "q5_1": 6.0, "q4_0": 4.5, "fp8_e4m3": 8.0, "fp8_e5m2": 8.0, "nvfp4": 4.5}


def decoded(kind: str, x: np.ndarray = X) -> np.ndarray:
    made = codec(kind, x.shape[-1])
    return np.array(made.decode(made.encode(mx.array(x))))


@pytest.mark.parametrize("kind", GGML)
def test_a_type_of_llama_cpp_decodes_as_its_own_package(kind):
    kind_there = gguf.GGMLQuantizationType[GGML[kind]]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(X.reshape(-1, DIM), kind_there), kind_there).reshape(X.shape)
    assert np.abs(decoded(kind) - theirs).max() < 1e-6  # float32 divides in another order


def every(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Return the numbers from 0 up of a small float by the OCP's definition, without infinities and NaN."""
    bias, codes = 2 ** (exponent_bits - 1) - 1, np.arange(2 ** (exponent_bits + mantissa_bits))
    exponents, parts = codes >> mantissa_bits, (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    values = np.where(exponents == 0, 2.0 ** (1 - bias) * parts, 2.0 ** (exponents - bias) * (1 + parts))
    return values[:-1] if exponent_bits == 4 else values[: -(2**mantissa_bits)]


@pytest.mark.parametrize(("kind", "form"), [("fp8_e4m3", (4, 3)), ("fp8_e5m2", (5, 2))])
def test_an_8_bit_float_is_the_nearest_one(kind, form):
    x = X.astype(np.float16).astype(np.float32)  # a float32 that float16 rounds to a tie can go to the other side
    numbers, got = every(*form), decoded(kind, x)
    assert np.isin(np.abs(got), numbers.astype(np.float32)).all()
    assert np.array_equal(np.abs(got - x), np.abs(np.abs(x)[..., None] - numbers).min(axis=-1).astype(np.float32))


def test_nvfp4_has_eight_sizes_and_a_scale_for_each_16():
    got = decoded("nvfp4").reshape(-1, 16)
    scales = every(4, 3)[1:].astype(np.float32)
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for block in got[:40]:
        assert any(np.isin(np.abs(block) / scale, sizes).all() for scale in scales)
    # the widest step is 2 of 6, and the E4M3 scale has an error of up to 1/16: half of 2/6, and values above 6
    blocks = X.reshape(-1, 16)
    assert (np.abs(got - blocks).max(axis=-1) <= np.abs(blocks).max(axis=-1) * (1 / 6 + 1 / 16)).all()


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_registered_type_makes_a_cache_of_its_true_bits(kind):
    model, ids = tiny("llama"), mx.array([[i * i % 90 for i in range(40)]])
    exact = model(ids)
    with registered():
        cache = vl.make_cache(model, kind, bits=WIDTHS[kind], sinks=0, window=0, chunk="codes")
        got = model(ids, cache=cache)
        assert vl.report(cache).drop_nulls("layer")["key_bits"].unique().to_list() == [TRUE_BITS[kind]]
    assert kind not in vl.methods()["id"]
    assert 0 < mx.abs(got - exact).max().item() < mx.abs(exact).max().item()


def test_rows_are_read_unchanged_and_missing_ones_are_ordered_by_window(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FILE", tmp_path / "rows.ndjson")
    assert results.kept() == {}
    first = results.missing(["sinks"], {})
    assert [job.part for job in first] == sorted(job.part for job in first)
    results.FILE.write_text(json.dumps(asdict(first[0]) | {"found": {"kl": 0.5}}) + "\n")
    assert results.kept() == {first[0]: {"kl": 0.5}}
    assert results.missing(["sinks"], results.kept()) == first[1:]


def test_each_row_of_caches_in_use_belongs_to_an_experiment():
    asked = [{"experiment": name} | job for name, (jobs, _) in in_use.EXPERIMENTS.items() for job in jobs()]
    rows = [row["asked"] for row in in_use.kept()]
    assert rows
    assert [row for row in rows if row not in asked] == []
    assert len(rows) == len({json.dumps(row) for row in rows})


def test_a_cache_filled_with_exact_keys_and_values_equals_one_that_read_the_prompt():
    model, ids = tiny("llama"), [i * i % 90 for i in range(150)]
    read, given = (vl.make_cache(model, "turboquant", bits=2, window=16) for _ in range(2))
    in_use.hand_over(Reader(model, own_cache(model)).read(ids).cache, given)
    Reader(model, read).read(ids)
    logits = [model(mx.array([[1, 2, 3]]), cache=cache) for cache in (read, given)]
    assert mx.array_equal(*logits)


def test_a_text_that_is_read_in_two_calls_says_what_it_says_in_one(monkeypatch):
    monkeypatch.setattr(in_use, "model", lambda: (tiny("llama"), Letters()))
    found = []
    for first_call in (500, 2048):
        monkeypatch.setattr(in_use, "CHUNK", first_call)
        in_use.with_passkey.cache_clear()
        found.append(in_use.passkey(700, 5, "none", 16)["nll"])
    in_use.with_passkey.cache_clear()
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # float32 sums in another order


def test_the_plane_outlines_the_best_pair_of_each_sum_and_counts_what_is_not_finite():
    pairs = pl.DataFrame({"key_bits": [2, 2, 3, 3], "value_bits": [2, 3, 2, 3], "kl": [0.9, 0.5, 0.3, 0.1]})
    assert plane_caption(pairs) == "Outlined, the best pair of each sum of bits: K3 V2"
    rows = bit_plane(pairs).data
    assert rows.filter("best").select("key_bits", "value_bits").rows() == [(3, 2)]
    worse = pairs.with_columns(kl=pl.Series([0.9, 0.5, None, 0.1]))
    assert plane_caption(worse) == "1 not drawn: not finite"
