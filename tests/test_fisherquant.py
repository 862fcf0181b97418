"""FisherQuant: a constrained trellis, bits planned for the whole model, and codes in the metric of the loss."""

import itertools
from threading import Event, current_thread, main_thread
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, save_prompt_cache
from scipy.special import log_softmax

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.fisherquant import FisherQuant
from veloxlab.codecs.fisherquant_planning import planned
from veloxlab.codecs.parts.rope import Rope
from veloxlab.codecs.parts.trellis import TrellisRows, levels_of
from veloxlab.codecs.parts.water_filling import shared_words
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.measure.derivative import drawn_gradients
from veloxlab.measure.gradients import with_gradients
from veloxlab.mlxlm.probe import slots_of

CODES = [("scalar", 256), ("trellis", 256), ("trellis", 1024)]
# loss of the prototype on a unit Gaussian at 1 to 4 bits
PROTOTYPE = {256: (0.303, 0.0863, 0.0233, 0.0070), 1024: (0.294, 0.0815, 0.0221, 0.0060)}


def normal(*shape, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed))


def lost(rows, x):
    """Return the mean squared error of unit coordinates of one head ``[N, D]``."""
    codes = rows.encode(x[None, None])["codes"]
    return mx.square(rows.expand(codes)[0, 0] - x).mean().item(), codes


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("entries", [256, 1024])
def test_the_trellis_loses_less_than_any_code_of_single_coordinates(width, entries):
    """With no more bits on disk: the string, 4 bits for the scale, and the padding of the last word."""
    x = normal(1500, 256)
    scalar, trellis = (
        TrellisRows(((width,) * 256,), levels_of(code, entries), scaled=False) for code in ("scalar", "trellis")
    )
    (by_levels, _), (by_trellis, codes) = lost(scalar, x), lost(trellis, x)
    assert codes.nbytes * 8 == 1500 * (width * 256 + 32)
    assert by_levels == pytest.approx(levels_of("scalar").distortion[width], rel=0.02)
    # the begin of a string, with few first states, costs 1 % of 256 coordinates
    assert by_trellis < 1.015 * PROTOTYPE[entries][width - 1]
    if width == 2:
        assert by_trellis < 0.095


@pytest.mark.parametrize("entries", [256, 1024])
def test_the_tables_lose_what_they_state(entries):
    levels = levels_of("trellis", entries)
    assert (np.diff(levels.distortion) < 0).all()
    assert (np.diff(levels.distortion, 2) > 0).all()  # otherwise no greedy choice of bits would be optimal
    for width in range(1, 9):
        rows = TrellisRows(((width,) * 512,), levels, scaled=False)
        assert lost(rows, normal(200, 512, seed=width))[0] == pytest.approx(levels.distortion[width], rel=0.04)


@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (3, 1, 0, 2), (5, 4), (1,) * 9])
def test_the_search_finds_the_best_of_all_strings(widths):
    levels = levels_of("trellis")
    weights = np.linspace(3.0, 1.0, len(widths))
    rows = TrellisRows((widths,), levels, weights[None], scaled=False)
    strings = np.arange(1 << sum(widths), dtype=np.uint32) << 4  # after the scale's bits
    every = mx.array(np.stack([strings, 0 * strings], axis=-1))[None, None]
    values = np.array(rows.expand(every)[0, 0])
    x = normal(40, len(widths), seed=3)
    distances = np.square(np.array(x)[:, None] - values) @ weights
    found = np.array(rows.expand(rows.encode(x[None, None])["codes"])[0, 0])
    assert np.allclose(np.square(np.array(x) - found) @ weights, distances.min(axis=1), atol=1e-5)


@pytest.mark.parametrize(("code", "entries"), CODES)
def test_the_kernel_writes_the_words_of_the_reference(code, entries):
    rng = np.random.default_rng(1)
    widths = tuple(tuple(map(int, np.sort(rng.integers(0, 9, 48))[::-1])) for _ in range(3))
    rows = TrellisRows(widths, levels_of(code, entries), 4.0 ** np.array(widths))
    x = normal(2, 1, 60, 144) * mx.exp(normal(2, 1, 60, 1, seed=1))  # with outliers
    found, wanted = computed(lambda _: rows.encoder, rows.encode, x)["codes"], rows.encode(x)["codes"]
    assert (found == wanted).mean().item() > 0.995  # of two equally near ones, either can be found
    assert rows.scales(wanted).max().item() > 2


def test_words_are_given_to_the_rows_where_they_save_most():
    """Compared with the best of all ways to share a budget."""
    rng = np.random.default_rng(0)
    savings = [np.sort(rng.exponential(size=(20, 8)), axis=1)[:, ::-1] * size for size in (1.0, 0.2, 3.0)]
    overheads, budget = [4, 0, 12], 9

    def saved(row, words):
        return np.sort(savings[row].ravel())[::-1][: 32 * words - overheads[row]].sum()

    best = max(
        sum(saved(row, words) for row, words in enumerate(shares))
        for shares in itertools.product(range(2, 6), repeat=3)
        if sum(shares) == budget
    )
    widths = shared_words(savings, overheads, budget)
    assert sum((own.sum() + over) / 32 for own, over in zip(widths, overheads, strict=True)) == budget
    found = sum(row[i, :width].sum() for row, own in zip(savings, widths, strict=True) for i, width in enumerate(own))
    assert found == pytest.approx(best)


def gradients_along(direction, x):
    """Return gradients that are nearly all along one direction."""
    noise = 0.02 * normal(*x.shape, seed=5)
    return normal(*x.shape[:3], 1, seed=6) * direction + noise


def test_directions_that_matter_to_the_loss_have_the_least_error():
    x, direction = normal(1, 2, 800, 64), mx.zeros(64).at[mx.array([7])].add(1.0)
    codec = METHODS["fisherquant"].codec(64, 2, "values")
    plain, ours = (codec.fit(Sample(x, gradients=g)) for g in (None, gradients_along(direction, x)))
    errors = [mx.square(c.decode(c.encode(x)) - x).mean(axis=(0, 1, 2)) for c in (plain, ours)]
    assert errors[1][7].item() < 0.02 * errors[0][7].item()
    assert errors[1].mean().item() > errors[0].mean().item()  # at the cost of the others


def test_one_calibration_serves_every_budget_and_heads_that_matter_get_more():
    x = normal(1, 2, 400, 64)
    quiet, loud = (
        FisherQuant(64, 1, "values").fit(Sample(x, gradients=size * normal(1, 2, 400, 64, seed=7)))
        for size in (0.2, 2.0)
    )
    for bits in (1.5, 2.25, 4.0, 6.7):
        both = planned({"quiet": quiet, "loud": loud}, bits)
        words = [codec.layout["codes"].count for codec in both.values()]
        assert sum(words) == round(4 * 64 * bits / 32)
        assert words[0] < words[1]
        assert both["loud"].forward is loud.forward


def test_keys_are_coded_about_a_mean_that_rope_rotates():
    """Keys that only RoPE moves cost nothing, at any start of a text."""
    rope, mean = Rope(64), 5 * normal(1, 2, 1, 64)

    def keys(tokens, start, seed):
        about = 0.1 * normal(1, 2, tokens, 64, seed=seed)
        return rope.forward(mx.broadcast_to(mean, about.shape), start) + about

    codec = METHODS["fisherquant"].codec(64, 2, "keys")
    turning, still = (codec.fit(Sample(keys(600, 4, 1), None, r, start=4)) for r in (rope, None))
    for start in (0, 77):
        x = keys(50, start, 2)
        errors = [mx.square(c.decode(c.encode(x, start)) - x).mean().item() for c in (turning, still)]
        assert errors[0] < 0.12 * 0.1**2 < errors[1] / 20


def test_positions_beyond_the_calibration_are_coded_equally_well():
    """Keys that vary along half of the coordinates, to which RoPE rotates the others later in a text."""
    rope = Rope(64, base=1e5)

    def keys(tokens, start, seed):
        return rope.forward(normal(1, 2, tokens, 64, seed=seed) * mx.where(mx.arange(64) < 32, 1.0, 0.05), start)

    sample = Sample(keys(500, 4, 1), None, rope, start=4, gradients=normal(1, 2, 500, 64, seed=3))
    short, long, none = (FisherQuant(64, 3, "keys", positions=last).fit(sample) for last in (504, 8192, 1))
    errors = [
        [mx.square(c.decode(c.encode(x, start)) - x).mean().item() for c in (short, long)]
        for start in (100, 7000)
        for x in [keys(100, start, 2)]
    ]
    assert errors[0][0] < errors[0][1] < errors[1][1] < errors[1][0] / 2
    assert mx.array_equal(short.forward, none.forward)


def test_before_rope_keys_share_directions_that_positions_mix():
    """Keys vary in few directions before RoPE, and the loss too: after RoPE, both are in all pairs."""
    rope = Rope(64)

    def keys(tokens, start, seed):
        return rope.forward(normal(1, 2, tokens, 64, seed=seed) * (mx.arange(64) < 8) + 4, start)

    sample = Sample(keys(800, 4, 1), None, rope, start=4, gradients=rope.forward(normal(1, 2, 800, 64, seed=3), 4))
    after, before = (FisherQuant(64, 1, "keys", **o).fit(sample) for o in ({}, BEFORE))
    for start in (0, 3000):
        x = keys(50, start, 2)
        errors = [mx.square(c.decode(c.encode(x, start)) - x).mean().item() for c in (after, before)]
        assert errors[1] < errors[0] / 5
    assert before.reader(before.encode(x)) is None
    values = FisherQuant(64, 1, "values", **BEFORE).fit(sample)
    assert values.reader(values.encode(x)) is not None  # positions do not matter for values
    with pytest.raises(InputError, match="fitted with basis='after_rope'.*calibrate with basis='before_rope'"):
        planned({0: after}, 2.0, **BEFORE)


BEFORE: dict[str, Any] = {"basis": "before_rope"}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def calibrate(model, folder, **settings):
    return vl.calibrate(model, Letters(), "fisherquant", TEXT, folder=folder, **({"tokens": 1024} | settings))


@pytest.fixture(scope="module")
def calibration(model, tmp_path_factory):
    return calibrate(model, tmp_path_factory.mktemp("calibrations"))


def test_a_cache_has_the_requested_bits(model, calibration):
    """All layers together, without tables and exact tokens."""
    values = 2 * 2 * 2 * 64  # of a token: layers, tensors, heads, coordinates
    for bits in (1, 2.25, 3.25, 8):
        cache = vl.make_cache(model, "fisherquant", bits=bits, calibration=calibration, sinks=0, window=0)
        model(mx.array([Letters().encode(TEXT)[:1000]]), cache=cache)
        assert 8 * sum(layer.nbytes for layer in cache) / (1000 * values) == pytest.approx(bits, rel=0.02)
    parts = vl.make_cache(model, "fisherquant", key_bits=3, value_bits=2, calibration=calibration)
    for name, bits in (("key_codec", 3), ("value_codec", 2)):
        assert np.mean([getattr(layer, name).bits_per_value for layer in parts]) == pytest.approx(bits, rel=0.02)


def test_options_of_the_code_need_no_other_calibration(model, calibration):
    given = {"bits": 2.25, "calibration": calibration}
    codecs = [vl.make_cache(model, "fisherquant", **given, **o)[0].key_codec for o in ({}, {"code": "scalar"})]
    assert [codec.code for codec in codecs] == ["trellis", "scalar"]
    with pytest.raises(InputError, match="'trellis' or 'scalar'"):
        vl.make_cache(model, "fisherquant", **given, code="x")


OFF: list[dict[str, Any]] = [{"metric": "pca"}, {"metric": "none"}, {"centre": "still"}, {"centre": "none"}]
OFF += [{"planning": "head"}, {"planning": "none"}, {"scale": "none"}]


def label(options):
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", OFF, ids=label)
def test_a_part_can_be_switched_off_at_the_same_bits(model, calibration, options):
    plain, without = (
        vl.make_cache(model, "fisherquant", bits=2.5, calibration=calibration, sinks=0, window=0, **given)
        for given in ({}, options)
    )
    ids = mx.array([Letters().encode(TEXT)[:300]])
    decoded = []
    for cache in (plain, without):
        model(ids, cache=cache)
        decoded.append(cache[1].state)
    assert sum(layer.nbytes for layer in plain) == sum(layer.nbytes for layer in without)
    assert not all(mx.array_equal(a, b).item() for a, b in zip(*decoded, strict=True))


def fitted_to_what_turns(**options):
    rope, x = Rope(64), normal(1, 2, 500, 64) * mx.linspace(2.0, 0.1, 64)
    gradients = gradients_along(mx.zeros(64).at[mx.array([7])].add(1.0), x)
    x = x + rope.forward(mx.broadcast_to(3 * normal(1, 2, 1, 64, seed=1), x.shape), 4)
    codec = METHODS["fisherquant"].codec(64, 2.5, "keys", **options)
    return x, codec.fit(Sample(x, None, rope, start=4, gradients=gradients))


def test_switches_of_learned_parts_have_their_effect():
    x, codec = fitted_to_what_turns(positions=1)  # later positions would mix channels
    off = {name: planned({0: codec}, 2.5, **dict([name.split("=")]))[0] for name in map(label, OFF)}
    errors = {name: mx.square(c.decode(c.encode(x, 4)) - x).mean().item() for name, c in {**off, "": codec}.items()}
    for name in ("metric=pca", "metric=none"):
        matrix = np.array(off[name].forward, np.float64)
        products = np.swapaxes(matrix, 1, 2) @ matrix  # identity for orthogonal axes
        assert np.allclose(products, products * np.eye(64), atol=0.02 * products.max())
    assert (np.array(off["metric=none"].forward)[:, ~np.eye(64, dtype=bool)] == 0).all()
    # independent channels are their own principal axes
    assert errors["metric=pca"] == pytest.approx(errors["metric=none"], rel=0.02)
    assert errors["metric=pca"] < errors[""]  # the loss depends on one direction
    assert not off["centre=none"].mean.any().item()
    assert off["centre=none"].rope is off["centre=still"].rope is None
    assert errors[""] < errors["centre=still"] < errors["centre=none"]
    assert {sum(head) for head in off["planning=head"].widths} <= {156, 157}  # and 3.5 of 160 bits for a scale
    assert {width for head in off["planning=none"].widths for width in head} == {2, 3}


def test_a_disabled_scale_is_one():
    x = 30 * normal(1, 1, 20, 128)
    for scaled in (True, False):
        rows = TrellisRows(((2,) * 64,) * 2, levels_of("trellis"), scaled=scaled)
        for codes in (rows.encode(x), computed(lambda _, rows=rows: rows.encoder, rows.encode, x)):
            assert (rows.scales(codes["codes"]).max().item() > 1) == scaled


@pytest.mark.parametrize(("width", "scales"), [(2, (1, 1, 2**0.5, 2**2.5)), (5, (1, 1, 1, 4))])
def test_a_scale_has_headroom_for_few_bits(width, scales):
    """2^(c/4), with c nearest to 4 log₂ of the RMS + 3.2 - 0.75 bits, or 0; also for 0 and NaN."""
    rows = TrellisRows(((width,) * 64,), levels_of("trellis"))
    x = mx.array([0.0, 0.5, 1.0, 4.0, float("nan")])[:, None] * mx.ones(64)
    for codes in (rows.encode(x[None, None, :4]), computed(lambda _: rows.encoder, rows.encode, x[None, None])):
        found = rows.scales(codes["codes"])[0, 0, :, 0].tolist()
        assert found == pytest.approx([*scales, 1][: len(found)], rel=1e-6)


def test_a_codec_fitted_with_a_switch_equals_one_switched_later_and_keeps_the_switch():
    (_, codec), (_, other) = fitted_to_what_turns(), fitted_to_what_turns(metric="pca", centre="still")
    later = planned({0: codec}, 2.5, metric="pca", centre="still")[0]
    assert mx.array_equal(later.forward, other.forward)
    assert later.widths == planned({0: other}, 2.5)[0].widths
    with pytest.raises(InputError, match="metric='pca' and centre='still' were given"):
        planned({0: other}, 2.5, metric="fisher")


def test_a_calibration_is_found_again_and_planned_the_same(model, calibration, tmp_path):
    calibration.save(tmp_path / "one")
    again = type(calibration).load(tmp_path / "one.json")
    x = normal(1, 2, 20, 64)
    for tensor in ("keys", "values"):
        codecs = [c.codec("fisherquant", 1, tensor, 2.25) for c in (calibration, again)]
        codes = [codec.encode(x, 3).arrays["codes"] for codec in codecs]
        assert mx.array_equal(*codes)


class Decoded(KVCache):
    """mlx-lm's own cache of decoded keys and values, with exact sinks."""

    def __init__(self, like, sinks):
        super().__init__()
        self.codecs, self.sinks = (like.key_codec, like.value_codec), sinks

    def update_and_fetch(self, keys, values):
        both = []
        for x, codec in zip((keys, values), self.codecs, strict=True):
            rest = codec.decode(codec.encode(x[:, :, self.sinks :], self.sinks), x.dtype)
            both.append(mx.concatenate([x[:, :, : self.sinks], rest], axis=2))
        return super().update_and_fetch(*both)


@pytest.mark.parametrize(("bits", "options"), [(1.25, {}), (3.25, {}), (2.25, BEFORE)])
def test_the_divergence_is_that_of_plain_caches_of_decoded_tokens(model, calibration, bits, options, tmp_path):
    """With mlx-lm's cache and attention, and SciPy's softmax."""
    if options:
        calibration = calibrate(model, tmp_path, **options)
    given = {"bits": bits, "calibration": calibration, "sinks": 4, "window": 0}
    measured = vl.fidelity(model, Letters(), "fisherquant", text=TEXT, tokens=300, **given)
    ids = mx.array([Letters().encode(TEXT)[:299]])
    caches = [Decoded(layer, 4) for layer in vl.make_cache(model, "fisherquant", **given)]
    exact, ours = (log_softmax(np.array(model(ids, cache=c)[0], np.float64), -1) for c in (None, caches))
    wanted = (np.exp(exact) * (exact - ours)).sum(-1).mean()
    assert measured["kl_mean"].item() == pytest.approx(wanted, rel=1e-3)  # for float32 sums
    assert wanted > 1e-5


def test_bits_out_of_range_are_refused_in_a_sentence(model, calibration):
    for bits in (0.5, 8.5, float("nan"), "2"):
        with pytest.raises(InputError, match="bits"):
            vl.make_cache(model, "fisherquant", bits=bits, calibration=calibration)
    with pytest.raises(InputError, match="TurboQuant takes whole numbers of bits from 1 to 8"):
        vl.make_cache(model, "turboquant", bits=2.25)


def test_gradients_are_returned_layer_by_layer_after_the_sinks(model, tmp_path):
    """With random signs: other signs give other gradients."""
    windows = [Letters().encode(TEXT)[i * 64 : (i + 1) * 64] for i in range(2)]
    told = []
    seen = list(with_gradients(model, windows, 4, 0, tmp_path / "first", lambda *step: told.append(step)))
    assert [(layer, tensor) for layer, tensor, _ in seen] == [(i, t) for i in (0, 1) for t in ("keys", "values")]
    assert [done for done, *_ in told] == [0, 1, 2, 3, 4]
    for _, _, sample in seen:
        assert sample.x.shape == sample.gradients.shape == (2, 2, 60, 64)
        assert (sample.start, sample.queries) == (4, None)
    assert not (tmp_path / "first").exists()
    places = [(seed, tmp_path / str(seed)) for seed in (0, 1)]
    again, other = (next(iter(with_gradients(model, windows, 4, *place, lambda *_: None)))[2] for place in places)
    assert mx.array_equal(again.gradients, seen[0][2].gradients)
    assert not mx.array_equal(other.gradients, seen[0][2].gradients)


def test_cancelled_work_continues_where_it_stopped(model, tmp_path, monkeypatch):
    """Windows that wait for a thread do not begin, and those that have begun are kept."""
    taken, stopped, gradients = [], Event(), drawn_gradients

    def counted(*given):
        taken.append(given)
        if len(taken) > 2:  # the first two share the cores
            stopped.wait()
        return gradients(*given)

    def stop(done, total, label):
        if done == 1:
            stopped.set()
            raise KeyboardInterrupt

    monkeypatch.setattr("veloxlab.measure.gradients.drawn_gradients", counted)
    monkeypatch.setattr("veloxlab.measure.calibrate.WINDOW", 128)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path, tokens=6 * 128, progress=stop)
    kept = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert kept == {str(w) for w in range(len(taken))}
    assert "0" in kept
    assert "5" not in kept
    again = calibrate(model, tmp_path, tokens=6 * 128)
    assert len(taken) == 6
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # the calibration's own
    at_once = calibrate(model, tmp_path / "other", tokens=6 * 128)
    for at, codec in at_once.codecs.items():
        assert mx.array_equal(codec.forward, again.codecs[at].forward)


def test_a_window_that_another_thread_cannot_differentiate_is_read_in_the_callers(model, tmp_path, monkeypatch):
    """A model can hold arrays that only the thread that made them can evaluate; there is no warning about gradients."""
    gradients = drawn_gradients

    def here_alone(*given):
        if current_thread() is not main_thread():
            raise RuntimeError("There is no Stream(cpu, 1) in current thread.")
        return gradients(*given)

    expected = calibrate(model, tmp_path / "by threads")
    monkeypatch.setattr("veloxlab.measure.gradients.drawn_gradients", here_alone)
    found = calibrate(model, tmp_path / "by one")
    for at, codec in expected.codecs.items():
        assert mx.array_equal(codec.forward, found.codecs[at].forward)


def test_a_damaged_window_is_named_and_made_again(model, calibration, tmp_path):
    def stop(done, total, label):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path, progress=stop)
    (file,) = tmp_path.rglob("0.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"0\.safetensors cannot be read .*checksum does not match.* made again now"):
        again = calibrate(model, tmp_path)
    for at, codec in calibration.codecs.items():
        assert mx.array_equal(codec.forward, again.codecs[at].forward)


def test_without_gradients_queries_replace_them_with_a_warning(model, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no vjp")

    monkeypatch.setattr("veloxlab.measure.gradients.drawn_gradients", fail)
    with pytest.warns(UserWarning, match=r"no gradients for some keys and values \(no vjp\)"):
        found = calibrate(model, tmp_path)
    codec = found.codec("fisherquant", 0, "keys", 2)
    assert np.allclose(np.array(codec.variances).sum(axis=1), 1, atol=1e-3)  # every head has the same weight


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "falcon_h1"])
def test_models_of_other_kinds_work_from_end_to_end(family, tmp_path):
    model = tiny(family)
    calibration = calibrate(model, tmp_path)
    cache = vl.make_cache(model, "fisherquant", bits=4, calibration=calibration, sinks=2, window=0, chunk="codes")
    ids = mx.array([Letters().encode(TEXT)[:60]])
    exact, ours = model(ids)[0], model(ids, cache=cache)[0]
    assert mx.linalg.norm(ours - exact) < 0.2 * mx.linalg.norm(exact)
    assert any(isinstance(getattr(slot, "key_codec", None), FisherQuant) for slot in slots_of(cache))
    made = [token for token, _ in generate_step(ids[0, :1], model, max_tokens=3, prompt_cache=cache)]
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = vl.load_cache(tmp_path / "cache.safetensors", model, "fisherquant", bits=4, calibration=calibration)
    goes_on = [model(mx.array([made[-1:]]), cache=one) for one in (cache, again)]
    assert mx.allclose(*goes_on, rtol=1e-4, atol=1e-5)  # buffers of other lengths are summed in another order
