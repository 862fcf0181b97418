"""Planned bytes are those of real caches, to the byte, and a context that fits by plan really fits."""

import json
from dataclasses import replace
from typing import Any

import mlx.core as mx
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import config_of, tiny
from veloxlab.cache.counts import BLOCK, Windows, calls, own_room
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.cache.runs import Runs, compressed_room
from veloxlab.codecs import METHODS
from veloxlab.codecs.none import Exact
from veloxlab.errors import InputError
from veloxlab.measure.planned_memory import GRAIN, LARGEST, MOST_TOKENS, PARTS, PLANNED, cache_layouts
from veloxlab.mlxlm.probe import slots_of
from veloxlab.models.shapes import shape_of

TOKENS, DECODED = 300, 40
SOME_EXACT: dict[str, Any] = {"sinks": 3, "window": 20}
LLAMA = config_of("llama")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def read(model, cache, tokens=TOKENS, decoded=DECODED, batch=1):
    """Feed a model as mlx-lm's generator does: a prompt in chunks except for its last token, then token by token."""
    ids = mx.arange(batch * tokens).reshape(batch, tokens) * 7 % 90
    start = 0
    for count in calls(tokens, decoded):
        model(ids[:, start : start + count], cache=cache)
        mx.eval([entry.state for entry in cache])
        start += count
    return cache


def parts_of(cache) -> dict[str, int]:
    """Return bytes of the live buffers of a prompt cache by part, with the plan's names."""
    sizes = dict.fromkeys(PARTS, 0)
    for layer in slots_of(cache):
        if not isinstance(layer, CompressedKVCache):
            sizes["states" if hasattr(layer, "cache") else "exact"] += layer.nbytes
            continue
        for part, run in (("sinks", layer.sinks), ("window", layer.recent)):
            sizes[part] += sum(buffer.nbytes for buffer in run.buffers.values())
        for buffer in layer.packed.buffers.values():
            exact = isinstance(layer.key_codec, Exact)
            sizes["scales" if mx.issubdtype(buffer.dtype, mx.floating) and not exact else "codes"] += buffer.nbytes
    sizes["tables"] = vl.report(cache).filter(pl.col("path") == "shared")["held_bytes"].sum()  # type: ignore[assignment]
    return {part: nbytes for part, nbytes in sizes.items() if nbytes}


def planned_parts(frame: pl.DataFrame) -> dict[str, int]:
    ours = frame.filter(pl.col("cache") == frame["cache"][0])
    return dict(ours.select("part", "bytes").rows())


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 400),
    decoded=st.integers(0, 80),
    sinks=st.integers(0, 6),
    window=st.sampled_from([0, 1, 7, 32, 70]),
    max_size=st.one_of(st.none(), st.integers(7, 160)),
    chunk=st.integers(1, 90),
)
def test_the_predicted_room_is_that_of_real_buffers(tokens, decoded, sinks, window, max_size, chunk):
    decoded = min(decoded, tokens)
    cache = CompressedKVCache(Exact(4), Exact(4), sinks=sinks, window=window, max_size=max_size)
    for count in calls(tokens, decoded, chunk):
        cache.update_and_fetch(*[mx.zeros((1, 1, count, 4))] * 2)
    real = [next((b.shape[2] for b in run.buffers.values()), 0) for run in (cache.sinks, cache.packed, cache.recent)]
    windows = Windows.of(sinks, window, max_size)
    room, bound = compressed_room(windows, tokens, decoded, chunk), windows.most_held(tokens)
    assert [room.sinks, room.packed, room.recent] == real
    assert sum(room) <= sum(bound)
    assert max_size or (room.sinks + room.recent <= bound.exact and room.packed <= bound.packed)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 700),
    decoded=st.integers(0, 80),
    max_size=st.one_of(st.none(), st.integers(2, 300)),
    chunk=st.integers(2, 400),
)
def test_the_predicted_room_of_mlx_lms_caches_is_the_real_one(tokens, decoded, max_size, chunk):
    decoded = min(decoded, tokens)
    sliding = [RotatingKVCache(max_size), ChunkedKVCache(max_size - 1)] if max_size else []
    for cache in sliding or [KVCache(), QuantizedKVCache(group_size=32, bits=4)]:
        for count in calls(tokens, decoded, chunk):
            if isinstance(cache, ChunkedKVCache):
                cache.maybe_trim_front()  # as Llama 4 does
            cache.update_and_fetch(*[mx.zeros((1, 1, count, 32))] * 2)  # type: ignore[attr-defined]
        keys = cache.keys[0] if isinstance(cache, QuantizedKVCache) else cache.keys  # type: ignore[attr-defined]
        assert own_room(tokens, decoded, max_size, chunk, chunked=isinstance(cache, ChunkedKVCache)) == keys.shape[2]


@given(
    window=st.sampled_from([0, 1, 16, 32, 100]),
    layer=st.integers(0, 40),
    counts=st.lists(st.one_of(st.just(1), st.integers(1, 200)), min_size=1, max_size=80),
)
def test_which_tokens_are_packed_does_not_depend_on_the_chunks(window, layer, counts):
    windows = Windows.of(4, window, None, layer)
    at_once, in_turn = Runs(windows), Runs(windows)
    for runs, some in ((at_once, [sum(counts)]), (in_turn, counts)):
        for count in some:
            runs.take(windows.arrival(count, runs.offset, runs.recent.tokens, all_seen=False))
            assert runs.recent.tokens <= windows.most_recent
    assert [run.tokens for run in at_once.runs] == [run.tokens for run in in_turn.runs]


def test_no_step_encodes_blocks_of_two_layers():
    layers = [Runs(Windows.of(4, 32, None, layer)) for layer in range(32)]
    arrivals = [runs.windows.arrival(1000, 0, 0, all_seen=False) for runs in layers]
    for _ in range(2 * BLOCK):
        for runs, arrival in zip(layers, arrivals, strict=True):
            runs.take(arrival)
        arrivals = [runs.windows.arrival(1, runs.offset, runs.recent.tokens, all_seen=False) for runs in layers]
        assert [arrival.to_packed for arrival in arrivals if arrival.to_packed] == [BLOCK]


@pytest.mark.parametrize("decoded", [0, DECODED])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_planned_bytes_are_those_after_mlx_lms_generator(family, decoded):
    model = tiny(family)
    prompt = mx.arange(TOKENS - decoded) * 7 % 90
    ours, own = vl.make_cache(model, bits=3, **SOME_EXACT), make_prompt_cache(model)
    for cache in (ours, own):
        assert len(list(generate_step(prompt, model, max_tokens=decoded, prompt_cache=cache))) == decoded
        assert cache[0].offset == TOKENS
    frame = vl.measure.plan_memory(model, bits=3, context=TOKENS, decoded=decoded, **SOME_EXACT)
    assert planned_parts(frame) == parts_of(ours)
    exact = frame.filter(pl.col("cache") == "fp16")["bytes"].sum()
    assert 2 * exact == sum(entry.nbytes for entry in own)  # these models compute in 32 bits


@pytest.mark.parametrize("decoded", [0, DECODED])
@pytest.mark.parametrize("method", METHODS)
def test_every_methods_plan_is_its_caches_bytes(model, method, decoded, calibrations):
    known = METHODS[method]
    bits = 32 if method == "none" else 2
    calibration = None
    if known.calibrated:
        text = "".join(chr(32 + i * i % 90) for i in range(400))
        calibration = vl.calibrate(model, Letters(), method, text, bits=bits, tokens=400, folder=calibrations)
    cache = read(model, vl.make_cache(model, method, bits=bits, calibration=calibration, **SOME_EXACT), decoded=decoded)
    asked: dict[str, Any] = {"context": TOKENS, "decoded": decoded, "bits": bits, **SOME_EXACT}
    fitted = planned_parts(vl.measure.plan_memory(model, method, calibration=calibration, **asked))
    assert fitted == parts_of(cache)
    before = planned_parts(vl.measure.plan_memory(model, method, **asked))
    if method == "spectralquant":  # levels of different widths: at most those of 1 to 8 bits, and 8 more words
        slack = before.pop("tables") - fitted.pop("tables")
        codecs = 2 * len(cache)
        assert -codecs * 4 * 511 <= slack <= 0
    if method == "fisherquant":  # a layer with more bits holds up to a block of packed tokens more or less
        assert before.pop("codes") == pytest.approx(fitted.pop("codes"), rel=0.01)
    assert before == fitted


@pytest.mark.parametrize("method", ["turboquant", "qjl"])
def test_outlier_channels_are_planned_before_they_are_found(model, method, tmp_path):
    asked: dict[str, Any] = {"bits": 2, **SOME_EXACT}
    text = "".join(chr(32 + i * i % 90) for i in range(400))
    calibration = vl.calibrate(model, Letters(), method, text, bits=2, tokens=100, outliers=8, folder=tmp_path)
    cache = read(model, vl.make_cache(model, method, calibration=calibration, **asked), decoded=0)
    assert planned_parts(vl.measure.plan_memory(model, method, context=TOKENS, outliers=8, **asked)) == parts_of(cache)


FAMILIES_PLANNED = ["gemma3_text", "mistral", "falcon_h1", "lfm2", "deepseek_v3", "qwen3_next", "gemma4_text", "phi"]
FAMILIES_PLANNED += ["llama4", "longcat_flash"]


@pytest.mark.parametrize("sliding", ["compressed", "exact"])
@pytest.mark.parametrize("family", FAMILIES_PLANNED)
def test_layers_of_every_kind_are_planned(family, sliding):
    model = tiny(family)
    cache = read(model, vl.make_cache(model, "turboquant", bits=3, sliding=sliding, **SOME_EXACT))
    frame = vl.measure.plan_memory(model, bits=3, context=TOKENS, decoded=DECODED, sliding=sliding, **SOME_EXACT)
    assert planned_parts(frame) == parts_of(cache)
    own = read(model, make_prompt_cache(model))
    held = sum(entry.nbytes for entry in own)
    states = sum(part for name, part in planned_parts(frame).items() if name == "states")
    exact = frame.filter(pl.col("cache") == "fp16", pl.col("part") == "exact")["bytes"].sum()
    assert 2 * exact + states == held  # these models compute in 32 bits


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_lms_quantized_caches_are_planned(model, bits):
    cache = read(model, [QuantizedKVCache(group_size=64, bits=bits) for _ in model.layers])
    frame = vl.measure.plan_memory(model, context=TOKENS, decoded=DECODED)
    assert frame.filter(pl.col("cache") == f"mlx-lm {bits} bit")["bytes"].sum() == sum(c.nbytes for c in cache)


def test_a_model_that_mlx_lm_cannot_quantize_has_no_quantized_layout():
    for family in ("gemma3_text", "deepseek_v3"):
        assert vl.measure.plan_memory(tiny(family))["cache"].unique().sort().to_list() == ["fp16", "turboquant K4 V4"]


def test_a_batch_holds_as_much_for_each_sequence_and_its_tables_once(model):
    cache = read(model, vl.make_cache(model, "turboquant", bits=4, **SOME_EXACT), batch=3)
    frame = vl.measure.plan_memory(model, context=TOKENS, decoded=DECODED, batch=3, **SOME_EXACT)
    assert planned_parts(frame) == parts_of(cache)
    assert frame["batch"].unique().to_list() == [3]


def test_head_bits_and_options_are_planned(model):
    for method, options in (("ratequant", {"head_bits": (2, 5)}), ("turboquant", {"variant": "prod"})):
        cache = read(model, vl.make_cache(model, method, bits=3, **SOME_EXACT, **options))
        frame = vl.measure.plan_memory(model, method, bits=3, context=TOKENS, decoded=DECODED, **SOME_EXACT, **options)
        assert planned_parts(frame) == parts_of(cache)


# shapes of models


def test_a_configuration_on_disk_has_the_shape_of_its_model(tmp_path, model):
    (tmp_path / "tiny").mkdir()
    file = tmp_path / "tiny" / "config.json"
    file.write_text(json.dumps(LLAMA))
    wide = shape_of(model)
    assert wide.exact_bytes == 4
    for given_as in (LLAMA, file, str(file), file.parent):
        shape = shape_of(given_as)
        assert [replace(cache, exact_bits=32) for cache in shape.caches] == list(wide.caches)
        assert shape.exact_bytes == 2
    assert shape_of(file.parent).name == "tiny"
    assert shape_of(LLAMA | {"torch_dtype": "float32"}).exact_bytes == 4
    config = config_of("lfm2")
    loaded, said = shape_of(tiny("lfm2")), [shape_of(config | extra) for extra in ({}, {"torch_dtype": "float32"})]
    assert [shape.state_bytes for shape in said] == [loaded.state_bytes // 2, loaded.state_bytes]
    assert loaded.state_bytes > 0
    typed = vl.models.ModelShape.typed(layers=2, kv_heads=2, head_dim=64)
    assert vl.measure.plan_memory(typed).equals(vl.measure.plan_memory(LLAMA))
    assert sum(cache.values_per_token for cache in typed.caches) == 2 * 2 * 128


def test_a_typed_shape_has_the_given_sliding_layers():
    config = config_of("gemma3_text")
    typed = vl.models.ModelShape.typed(
        layers=3, kv_heads=2, head_dim=64, sliding_window=config["sliding_window"], full_every=3
    )
    assert vl.measure.plan_memory(typed, context=5000).equals(vl.measure.plan_memory(config, context=5000))


def test_a_large_models_weights_are_never_computed():
    before = mx.get_active_memory()
    config = LLAMA | {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    mx.reset_peak_memory()
    shape = shape_of(config | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128})
    assert sum(cache.values_per_token for cache in shape.caches) == 80 * 8 * 256
    assert mx.get_peak_memory() - before < 1_000_000  # bytes, for weights of 10^11


def test_a_repository_is_found_only_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    revision.mkdir(parents=True)
    (revision / "config.json").write_text(json.dumps(LLAMA))
    refs = tmp_path / "models--someone--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert shape_of("someone/tiny").name == "someone/tiny"
    with pytest.raises(InputError, match="no file or folder someone/other, .* nothing is downloaded"):
        shape_of("someone/other")


# largest contexts


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1"])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_largest_context_fits_and_a_little_more_does_not(family, batch):
    layouts = cache_layouts(tiny(family), bits=3)
    for layout in layouts:
        for memory in (3e6, 2e7, 1.37e8):
            tokens = layout.largest_context(memory, batch)
            assert 0 < tokens < MOST_TOKENS
            assert layout.held(tokens, batch) <= memory < layout.held(tokens + GRAIN, batch)
    assert layouts[0].largest_context(1, batch) == 0


def test_a_cache_that_never_grows_fits_any_context(model):
    shape = vl.models.ModelShape.typed(layers=2, kv_heads=2, head_dim=64, sliding_window=128)
    assert cache_layouts(shape)[0].largest_context(1e9) == MOST_TOKENS


def test_frames_have_their_columns_and_the_kind_predicted(model):
    frame = vl.measure.plan_memory(model, context=[1000, 2000])
    assert frame.schema == PLANNED
    assert frame["kind"].unique().to_list() == ["predicted"]
    assert frame["tokens"].unique().sort().to_list() == [1000, 2000]
    rows = vl.measure.largest_contexts(model, 1e8)
    assert rows.schema == LARGEST
    assert rows["cache"].to_list() == ["turboquant K4 V4", "fp16", "mlx-lm 4 bit", "mlx-lm 8 bit"]
    assert rows["tokens"][0] > 3 * rows["tokens"][1]


@pytest.mark.parametrize(
    ("given_as", "settings", "sentence"),
    [
        (LLAMA, {"method": "turbo"}, "Unknown method 'turbo'"),
        (LLAMA, {"bits": 9}, "Keys at bits=9 are out of range"),
        (LLAMA, {"bits": 0}, "Keys at bits=0 are out of range"),
        (LLAMA, {"key_bits": 0}, "Keys at bits=0 are out of range"),
        (LLAMA, {"value_bits": 0}, "Values at bits=0 are out of range"),
        (LLAMA, {"context": 5, "decoded": 6}, "context=5 has fewer tokens than decoded=6: give no less than those"),
        (LLAMA, {"colour": "red"}, "TurboQuant has no option 'colour'"),
        ({"model_type": "nothing"}, {}, "mlx-lm cannot make a model of this configuration .model_type 'nothing'"),
        ({}, {}, "mlx-lm cannot make a model of this configuration"),
        ("/nowhere/config.json", {}, "There is no file or folder /nowhere/config.json"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(given_as, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        vl.measure.plan_memory(given_as, **settings)


def test_an_impossible_shape_is_refused():
    with pytest.raises(InputError, match="full_every=6 has no meaning without sliding_window"):
        vl.models.ModelShape.typed(layers=2, kv_heads=2, head_dim=64, full_every=6)


def test_a_folder_without_a_configuration_is_named(tmp_path):
    with pytest.raises(InputError, match=f"The folder {tmp_path} has no config.json, and no"):
        shape_of(tmp_path)


def test_an_mlx_lm_without_classes_of_models_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.delattr("mlx_lm.utils._get_classes")
    with pytest.raises(InputError, match="mlx-lm cannot make a model of this configuration .*ImportError"):
        shape_of(LLAMA)


def test_an_unreadable_configuration_is_refused(tmp_path):
    for content in ("{", "[]"):
        file = tmp_path / "config.json"
        file.write_text(content)
        with pytest.raises(InputError, match=r"config\.json (is not a readable|holds no) configuration"):
            shape_of(file)
