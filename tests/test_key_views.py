"""Charts of keys, values and their errors: captions, marks, pooling and refused input."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable

import altair as alt
import numpy as np
import polars as pl
import pytest

from tests.test_views import drawn, words
from veloxlab import views
from veloxlab.errors import InputError
from veloxlab.measure.distributions import CHANNELS, DENSITIES, OUTLIERS, SPACES
from veloxlab.measure.errors import ATTENTION_MAP, ERROR_DENSITIES, PROFILE
from veloxlab.measure.levels import ANGLES, LEVELS
from veloxlab.measure.spectra import DIMENSIONS, PAIR_POINTS, PAIRS, SPECTRUM
from veloxlab.views import errors, picture, theme
from veloxlab.views.distributions import SPACE_WORDS
from veloxlab.views.spec import Spec, split

TENSORS = ("keys", "values")


def channels(dim: int = 8, spaces=("raw",), tensors=TENSORS, loud: float = 6.0, **replaced) -> pl.DataFrame:
    rows = [
        {
            "layer": 2,
            "head": 1,
            "tensor": tensor,
            "space": space,
            "channel": channel,
            "mean": 0.5 * size,
            "rms": size,
            "least": -3 * size,
            "low": -2 * size,
            "median": 0.0,
            "high": 2 * size,
            "most": 3 * size,
            "not_finite": 0,
        }
        for space, tensor, channel in itertools.product(spaces, tensors, range(dim))
        for size in [loud if channel == 5 else 1.0]
    ]
    return _with_first(pl.DataFrame(rows, schema=CHANNELS), replaced)


def coordinates(spaces=("raw",), tensors=TENSORS, scale: float = 1.0, **replaced) -> pl.DataFrame:
    value = np.linspace(-3, 3, 80)
    place = {"layer": 2, "head": 1, "below": 0.0004, "above": 0.0003, "not_finite": 0}
    frames = [
        pl.DataFrame(
            {"value": value * scale, "width": 0.076 * scale, "density": np.exp(-(value**2) / 2) / scale}
        ).select(*(pl.lit(v).alias(k) for k, v in (place | {"tensor": tensor, "space": space}).items()), pl.all())
        for space, tensor in itertools.product(spaces, tensors)
    ]
    frame = pl.concat(frames).select(pl.col(name).cast(dtype) for name, dtype in DENSITIES.items())
    return _with_first(frame, replaced)


def levels(bits: int = 2, count: int | None = None) -> pl.DataFrame:
    values = np.linspace(-1.5, 1.5, 2**bits if count is None else count)
    rows = []
    for tensor in TENSORS:
        place = {"layer": 2, "head": 1, "tensor": tensor, "bits": bits, "outside": 0.001}
        rows += [
            place | {"kind": "exact", "value": v, "width": 0.1, "density": math.exp(-v * v), "share": 0.01}
            for v in np.linspace(-2, 2, 40)
        ]
        if len(values) > 32:
            rows += [
                place | {"kind": "decoded", "value": v, "width": 0.1, "density": 0.2, "share": 0.1} for v in values
            ]
        else:
            rows += [place | {"kind": "level", "value": v, "share": 1 / len(values)} for v in values]
    return pl.DataFrame(rows, schema=LEVELS)


def loudness(layers: int = 4, **replaced) -> pl.DataFrame:
    rows = [
        {
            "layer": layer,
            "head": head,
            "tensor": tensor,
            "space": space,
            "loudest": 5,
            "loudest_ratio": 2.0 + place,
            "outlier_channels": 1,
            "peak_ratio": 4.0,
            "not_finite": 0,
        }
        for (place, space), tensor, layer, head in itertools.product(
            enumerate(SPACES), TENSORS, range(layers), range(2)
        )
        if not (space == "before_rope" and tensor == "values")
    ]
    return _with_first(pl.DataFrame(rows, schema=OUTLIERS), replaced)


def shares(dim: int = 16) -> pl.DataFrame:
    rows = [
        {"layer": 2, "head": 1, "tensor": tensor, "about": about, "rank": rank, "share": share}
        for tensor in TENSORS
        for about, first in (("origin", 0.5), ("mean", 1 / dim))
        for rank in range(1, dim + 1)
        for share in [first if rank == 1 else (1 - first) / (dim - 1)]
    ]
    return pl.DataFrame(rows, schema=SPECTRUM)


def counts(layers: int = 4) -> pl.DataFrame:
    rows = [
        {"layer": layer, "head": head, "tensor": tensor, "head_dim": 64, "uncentred": 3.0, "centred": 24.0}
        | {"mean_share": 0.6 if tensor == "keys" else 0.2}
        for tensor, layer, head in itertools.product(TENSORS, range(layers), range(2))
    ]
    return pl.DataFrame(rows, schema=DIMENSIONS)


def pairs(count: int = 8) -> pl.DataFrame:
    rows = [
        {"layer": 2, "head": 1, "pair": i, "first": i, "second": i + count, "wavelength": 6.28 * 10**i}
        | {"energy_share": 0.3 if i == 5 else 0.1, "mean_share": 0.9 if i == 5 else 0.1}
        for i in range(count)
    ]
    return pl.DataFrame(rows, schema=PAIRS)


def points(tokens: int = 20) -> pl.DataFrame:
    rows = [
        {"position": i, "stage": stage, "x": math.cos(i * turn), "y": math.sin(i * turn)}
        for stage, turn in (("before RoPE", 0.0), ("after RoPE", 0.3))
        for i in range(tokens)
    ]
    return pl.DataFrame(rows, schema=PAIR_POINTS)


def angles() -> pl.DataFrame:
    rows = [
        {"layer": 2, "head": 1, "tensor": tensor, "level": level, "angle": a, "density": 1.0, "expected": 0.5}
        for tensor in TENSORS
        for level in (1, 2)
        for a in np.linspace(0.1, 1.4, 20)
    ]
    return pl.DataFrame(rows, schema=ANGLES)


def attention(blocks: int = 6, **replaced) -> pl.DataFrame:
    rows = [
        {"kind": kind, "query": 4 * q, "query_end": 4 * q + 4, "key": 4 * k, "key_end": 4 * k + 4}
        | {"weight": 0.1 if kind == "difference" else 1 / (q + 1), "moved": 0.1 if q < blocks - 1 else 0.4}
        for kind in ("exact", "compressed", "difference")
        for q in range(blocks)
        for k in range(q + 1)
    ]
    return _with_first(pl.DataFrame(rows, schema=ATTENTION_MAP), replaced)


def profile(**replaced) -> pl.DataFrame:
    rows = [
        {"tensor": tensor, "bits": bits, "position": at, "position_end": at + 8, "not_finite": 0}
        | {"low": 0.5 / 4**bits, "median": 1 / 4**bits, "high": 2 / 4**bits}
        for tensor, bits, at in itertools.product(TENSORS, (2, 4), range(0, 64, 8))
    ]
    return _with_first(pl.DataFrame(rows, schema=PROFILE), replaced)


def spread(zero: int = 0) -> pl.DataFrame:
    edges = np.geomspace(0.01, 1, 21)
    rows = [
        {"tensor": tensor, "bits": bits, "least": low, "most": high, "share": 0.05, "zero": zero, "not_finite": 0}
        for tensor, bits in itertools.product(TENSORS, (2, 4))
        for low, high in itertools.pairwise(edges)
    ]
    return pl.DataFrame(rows, schema=ERROR_DENSITIES)


def _with_first(frame: pl.DataFrame, replaced: dict[str, float]) -> pl.DataFrame:
    """Return the frame with other values in its first row."""
    first = pl.int_range(pl.len()) == 0
    return frame.with_columns(pl.when(first).then(v).otherwise(k).alias(k) for k, v in replaced.items())


def by_layer(layers: int = 3, dim: int = 8, **replaced) -> pl.DataFrame:
    frames = [
        channels(dim, tensors=("keys",), loud=4.0 + i).with_columns(layer=pl.lit(i, pl.Int32)) for i in range(layers)
    ]
    return _with_first(pl.concat(frames), replaced)


FRAMES: dict[str, tuple[Callable[..., alt.VConcatChart], Callable[..., pl.DataFrame]]] = {
    "channel_ranges": (views.channel_ranges, channels),
    "channel_map": (views.channel_map, by_layer),
    "density": (views.density, coordinates),
    "levels_on_density": (views.levels_on_density, levels),
    "outliers_by_layer": (views.outliers_by_layer, loudness),
    "spectrum": (views.spectrum, shares),
    "dimensions_by_layer": (views.dimensions_by_layer, counts),
    "pair_energy": (views.pair_energy, pairs),
    "pair_turns": (views.pair_turns, points),
    "angle_densities": (views.angle_densities, angles),
    "attention_maps": (views.attention_maps, attention),
    "errors_along_position": (views.errors_along_position, profile),
    "error_distribution": (views.error_distribution, spread),
}
OF_ONE_HEAD = ("channel_ranges", "density", "levels_on_density", "spectrum", "pair_energy", "angle_densities")
BY_LAYER = ("outliers_by_layer", "dimensions_by_layer")


@functools.cache
def spec_of(name: str) -> Spec:
    """Return the spec of a chart of its frame, made once; tests must not change it."""
    draw, frame = FRAMES[name]
    return draw(frame()).to_dict()


@pytest.mark.parametrize("name", FRAMES)
def test_a_chart_has_a_heading_units_and_draws_the_caption_it_is_given_later(name):
    spec = spec_of(name)
    said = words(drawn(spec, caption="said later"))
    assert spec["title"]["text"] in said
    assert "said later" in said
    assert spec["params"][0]["value"] not in ("", None)  # a default caption
    assert not re.search(r"NaN|undefined|null", drawn(spec))


@pytest.mark.parametrize("name", FRAMES)
def test_every_column_that_a_chart_needs_is_checked(name):
    draw, frame = FRAMES[name]
    needed = [column for column in frame().columns if _refused(draw, frame().drop(column))]
    used = set(re.findall(r"datum\.(\w+)|\"field\": \"(\w+)\"", str(spec_of(name)).replace("'", '"')))
    drawn_columns = {a or b for a, b in used} & set(frame().columns)
    assert drawn_columns
    assert drawn_columns <= set(needed)
    assert _refused(draw, frame().clear())


def _refused(draw, frame) -> bool:
    try:
        draw(frame)
    except InputError as error:
        return "needs" in str(error)
    return False


@pytest.mark.parametrize("name", OF_ONE_HEAD)
def test_a_frame_of_several_heads_or_layers_is_refused_in_a_sentence(name):
    draw, frame = FRAMES[name]
    for column in ("layer", "head"):
        two = pl.concat([frame(), frame().with_columns(pl.col(column) + 1)])
        sentence = f"{name} shows one value of '{column}' and the frame has 2: choose with frame.filter({column}="
        with pytest.raises(InputError, match=re.escape(sentence)):
            draw(two)


def test_a_map_of_several_heads_tensors_or_spaces_is_refused():
    for column, other in (("head", 7), ("tensor", "values"), ("space", "rotated")):
        two = pl.concat([by_layer(), by_layer().with_columns(pl.lit(other, by_layer().schema[column]).alias(column))])
        with pytest.raises(InputError, match=f"channel_map shows one value of '{column}' and the frame has 2"):
            views.channel_map(two)


@pytest.mark.parametrize("name", OF_ONE_HEAD)
def test_a_caption_names_the_head(name):
    said = spec_of(name)["params"][0]["value"]
    assert "Layer 2, KV head 1." in said


@pytest.mark.parametrize(
    ("draw", "one", "other"),
    [
        (views.channel_ranges, channels, lambda: channels(loud=9).with_columns(layer=pl.lit(7))),
        (views.density, coordinates, lambda: coordinates(scale=4).with_columns(head=pl.lit(0))),
        (views.levels_on_density, lambda: levels(3), lambda: levels(2)),
        (views.spectrum, lambda: shares(16), lambda: shares(12)),
    ],
)
def test_another_layer_or_head_is_the_same_spec_with_other_numbers(draw, one, other):
    specs = [split(draw(frame()).to_dict()) for frame in (one, other)]
    assert specs[0][0] == specs[1][0]
    assert specs[0][1] != specs[1][1]


@functools.cache
def many_panels() -> alt.VConcatChart:
    return views.channel_ranges(channels(256, spaces=SPACES))


@pytest.mark.parametrize(
    "chart",
    [
        many_panels,
        lambda: views.channel_map(by_layer(80, 128)),
        lambda: views.outliers_by_layer(loudness(64)),
        lambda: views.attention_maps(attention(32)),
        lambda: views.pair_turns(points(800)),
        lambda: views.levels_on_density(levels(5)),
        lambda: views.density(coordinates(spaces=SPACES)),
    ],
)
def test_at_most_two_thousand_marks_are_drawn(chart):
    drawing = drawn(chart())
    marks = re.findall(r'aria-roledescription="(?:point|circle|(?:rect|rule|area|line|text) mark)"', drawing)
    marks += re.findall(r"<path (?:d|transform)=", drawing)  # marks that a screen reader skips
    assert 0 < len(marks) <= 2_000


def test_channels_of_many_panels_are_grouped_and_labelled():
    assert "channels, by 6" in words(drawn(many_panels()))
    assert "channel" in words(drawn(views.channel_ranges(channels(64, spaces=("raw",)))))


@pytest.mark.parametrize(
    ("chart", "count"),
    [
        (lambda **more: views.channel_ranges(channels(**more)), {"not_finite": 3}),
        (lambda **more: views.channel_map(by_layer(**more)), {"not_finite": 3}),
        (lambda **more: views.outliers_by_layer(loudness(**more)), {"not_finite": 3}),
        (lambda **more: views.attention_maps(attention(**more)), {"weight": math.nan, "moved": math.nan}),
        (lambda **more: views.errors_along_position(profile(**more)), {"not_finite": 3}),
    ],
)
def test_values_that_are_not_finite_have_a_cross_and_are_counted(chart, count):
    said = words(drawn(chart(**count)))
    assert said.count("×") == 1
    assert any(re.search(r"× \d not finite", line) for line in said)
    assert not any("nan" in line for line in said)
    assert "×" not in words(drawn(chart()))


def test_a_density_states_the_share_outside_its_range():
    assert "Beyond the ends lie 0.07 % of coordinates at most" in views.density_caption(coordinates())
    assert "× 4 not finite" in views.density_caption(coordinates(tensors=("keys",)).with_columns(not_finite=pl.lit(4)))


def test_the_caption_has_the_largest_channel():
    said = views.channel_map_caption(by_layer())
    assert said == "KV head 1. Largest: layer 2, channel 5, 6.0 times the median channel"
    assert "over the median one: keys as cached 6.0, values as cached 6.0" in views.channel_caption(channels())
    many = pl.concat(
        [channels(tensors=("keys",), spaces=(s,), loud=v) for s, v in zip(SPACES, range(2, 8), strict=True)]
    )
    assert views.channel_caption(many).endswith("median one: eigenbasis 7.0, as cached 2.0")
    assert "Keys, mean: as cached 2.0, before RoPE 3.0" in views.outlier_caption(loudness())


@pytest.mark.parametrize(("bits", "shown"), [(2, "25%"), (3, "13%"), (4, None)])
def test_levels_are_drawn_and_a_few_have_their_share(bits, shown):
    drawing = drawn(views.levels_on_density(levels(bits), method="rvq"))
    assert len(re.findall(r'aria-label="[^"]*level: ', drawing)) == 2 * 2**bits
    percents = [word for word in words(drawing) if word.endswith("%") and word[0].isdigit()]
    assert percents == ([] if shown is None else [shown] * 2 * 2**bits)
    assert f"rvq at {bits} bits. Layer 2, KV head 1. keys: {2**bits} levels" in views.levels_caption(
        levels(bits), "rvq"
    )


def test_a_vector_code_is_a_line():
    drawing = drawn(views.levels_on_density(levels(4, count=40)))
    assert "level: " not in drawing
    assert "keys: no common levels, a line" in views.levels_caption(levels(4, count=40))


def test_the_caption_has_effective_dimensions():
    flat, first = 8, 1 / (0.25 + 7 * (0.5 / 7) ** 2)
    assert f"keys {first:.1f} with the mean, {flat:.1f} without it" in views.spectrum_caption(shares(8))
    assert "keys 3.0 with the mean, 24.0 without" in views.dimensions_caption(counts())
    assert "The mean vector holds 60 % and 20 %" in views.dimensions_caption(counts())


def test_the_strongest_pair_is_named():
    said = views.pair_caption(pairs())
    assert "Pair 5 (channels 5 and 13) holds 30 %, 90 % of it its mean; the slower half 60 %" in said


def test_the_caption_has_the_share_of_unexpected_angles():
    said = views.angle_caption(angles().with_columns(expected=pl.lit(0.5) + pl.col("level").cast(pl.Float64) / 4))
    assert said.endswith("by level: keys 12, 0 %; values 12, 0 %")


def test_attention_that_moved_is_weighted_by_queries():
    said = views.attention_caption(attention())
    assert said == "15.0 % of attention moves to other keys; most, 40.0 %, for queries 20 to 23"


def test_a_screen_reader_gets_the_content_of_maps_and_not_each_cell():
    drawing = drawn(views.attention_maps(attention()))
    assert "of attention moves to other keys" in drawing
    assert 'aria-roledescription="rect mark"' not in drawing  # writing these takes a third of a redraw


def test_the_three_maps_share_one_scale():
    drawing = drawn(views.attention_maps(attention()))
    assert {"exact keys", "compressed keys", "|difference|"} <= set(words(drawing))
    assert words(drawing).count("attention weight") == 1  # one legend


def test_labels_under_narrow_maps_do_not_run_together(monkeypatch):
    monkeypatch.setattr(errors, "SIDE", 105)  # pixels: at 1440 pixels of window, 512 tokens need as much room
    drawing = drawn(views.attention_maps(attention(32).with_columns(pl.col("^(query|key)(_end)?$") * 4)))
    labels = re.findall(r"translate\(\d[^>]*>[1-5]00<", drawing)  # of the x axes: those of the y axis are left of 0
    shown = {label[-4:-1] for label in labels if 'opacity="0"' not in label}
    assert shown == {"200", "400"}  # the others are 21 pixels apart, and about 20 wide


def test_vectors_without_error_are_counted():
    assert views.distribution_caption(spread(zero=3)) == "12 vectors without error are not drawn"
    assert views.distribution_caption(spread()) == "Every vector of the capture is counted"


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_picked_layer_is_marked(name):
    assert theme.PICKED not in drawn(spec_of(name))
    assert theme.PICKED in drawn(spec_of(name), picked_layer=2)


@pytest.mark.parametrize("name", FRAMES)
def test_keys_and_values_have_their_colours_and_a_chart_fits_a_notebook(name):
    drawing = picture.svg(spec_of(name))
    if name not in ("attention_maps", "outliers_by_layer", "channel_map"):
        assert theme.KEYS in drawing
    if "tensor" in FRAMES[name][1]().columns and name not in ("outliers_by_layer", "channel_map"):
        assert theme.VALUES in drawing
    assert float(re.search(r' width="([\d.]+)"', drawing)[1]) < 790
    assert "container" not in str(spec_of(name))


def test_every_space_has_words_and_a_look_of_its_own():
    assert set(SPACE_WORDS) == set(theme.SPACES) == set(SPACES)
    assert len(set(theme.SPACES.values())) == len(SPACES)
    assert not {colour for colour, _ in theme.SPACES.values()} & set(theme.TENSORS.values())
