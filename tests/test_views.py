"""Charts: content, marks, refused input, and a spec that does not change when only numbers do."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import struct
import zlib
from collections.abc import Callable

import altair as alt
import nbformat
import numpy as np
import polars as pl
import pytest
import vl_convert
from hypothesis import given
from hypothesis import strategies as st

from veloxlab import views
from veloxlab.errors import InputError
from veloxlab.views import picture, theme
from veloxlab.views.allocation import KINDS
from veloxlab.views.columns import log_domain, log_ticks
from veloxlab.views.generation import SIDES
from veloxlab.views.spec import Spec, describe, join, split, title_of


def error_frame(layers: int = 4, heads: int = 2, scale: float = 0.01, **replaced: float | None) -> pl.DataFrame:
    rows = [
        {"layer": layer, "head": head, "tensor": tensor, "rel_mse": scale * (1 + layer + head / 10)}
        for tensor, layer, head in itertools.product(("keys", "values"), range(layers), range(heads))
    ]
    frame = pl.DataFrame(rows).with_columns(
        cosine=1 - pl.col("rel_mse") / 2,
        logit_error=pl.when(pl.col("tensor") == "keys").then("rel_mse"),
        output_error=pl.col("rel_mse"),
    )
    first = (pl.col("layer") == 0) & (pl.col("head") == 0) & (pl.col("tensor") == "keys")
    return frame.with_columns(
        pl.when(first).then(value).otherwise(name).alias(name) for name, value in replaced.items()
    )


def bit_frame(layers: int = 4, codes: float = 3.0) -> pl.DataFrame:
    rows = [
        {"layer": layer, "tensor": tensor, "part": part, "bits_per_value": bits}
        for tensor, layer in itertools.product(("keys", "values"), range(layers))
        for part, bits in (("codes", codes), ("scales", 0.25))
    ]
    return pl.DataFrame(rows)


def memory_frame(layers: int = 4) -> pl.DataFrame:
    rows = [
        {"tokens": tokens, "cache": cache, "layer": layer, "bytes": tokens * each * 1000, "kind": kind}
        for tokens, kind in ((512, "measured"), (1024, "measured"), (2048, "predicted"))
        for cache, each in (("fp16", 4), ("turboquant", 1))
        for layer in range(layers)
    ]
    return pl.DataFrame(rows)


def fidelity_frame() -> pl.DataFrame:
    names = [f"{method} K{bits} V{bits}" for method in ("turboquant", "rvq") for bits in (2, 4)]
    count = range(len(names) + 1)
    return pl.DataFrame(
        {
            "name": [*names, "none"],
            "key_bits": [2.25, 4.25, 2.5, 4.5, 16.0],
            "value_bits": [2.25, 4.25, 2.5, 4.5, 16.0],
            "kl_mean": [0.2, 0.01, 0.3, 0.02, 0.0],
            "held_bytes": [1_000_000 * (i + 1) for i in count],
            "top1_flips": [0.1 * i for i in count],
            "perplexity": [12.0 + i for i in count],
        }
    )


def pareto_frame() -> pl.DataFrame:
    states = ["front", "front", "dominated", "over budget", "not finite"]
    return pl.DataFrame(
        {
            "row": range(5),
            "method": ["rvq", "turboquant", "turboquant", "qjl", "qjl"],
            "key_bits": [2, 4, 2, 8, 1],
            "value_bits": [2, 4, 4, 8, 1],
            "sinks": [4] * 5,
            "window": [0] * 5,
            "protected": [[], [0, 29], [], [], []],
            "bytes_per_token": [3000.5, 6000.0, 6100.0, 9000.0, 2000.0],
            "windows": [8, 8, 3, 0, 1],
            "kl": [0.9, 0.04, 0.5, None, math.nan],
            "low": [0.8, -0.01, 0.4, None, None],
            "high": [1.0, 0.09, 0.6, None, None],
            "state": states,
        },
        schema_overrides={"protected": pl.List(pl.Int32)},
    )


def head_frame(layers: int = 4, heads: int = 2, more: int = 0) -> pl.DataFrame:
    """Return a frame of heads; layer 0 is exact."""
    rows = [
        {
            "layer": layer,
            "head": head,
            "tensor": tensor,
            "method": "none" if layer == 0 else "ratequant",
            "bits": 16 if layer == 0 else 2 + (layer + head + more) % 4,
            "predicted_loss": 0.0 if layer == 0 else 0.25 * layer,
        }
        for tensor, layer, head in itertools.product(("keys", "values"), range(layers), range(heads))
    ]
    return pl.DataFrame(rows)


def loss_frame(layers: int = 4, scale: float = 1.0) -> pl.DataFrame:
    rows = [
        {"layer": layer, "kind": kind, "predicted_loss": scale * times * (1 + layer)}
        for layer, (kind, times) in itertools.product(range(layers), (("allocated", 0.1), ("uniform", 0.25)))
    ]
    return pl.DataFrame(rows)


def sensitivity_frame(layers: int = 4, heads: int = 2) -> pl.DataFrame:
    rows = [
        {"layer": layer, "head": head, "tensor": tensor, "sensitivity": 0.01 * (1 + layer) * 4.0**head}
        for tensor, layer, head in itertools.product(("keys", "values"), range(layers), range(heads))
    ]
    return pl.DataFrame(rows)


def line_frame(steps: int = 5) -> pl.DataFrame:
    rows = [
        {
            "kind": kind,
            "true_bits": 2 + 4 * step / (steps - 1),
            "predicted_loss": factor * 4.0 ** (-4 * step / (steps - 1)),
        }
        for kind, factor in (("allocated", 1.0), ("uniform", 2.0))
        for step in range(steps)
    ]
    return pl.DataFrame(rows)


def budget_rows(bits: float = 3.0, measured: float | None = 0.125) -> pl.DataFrame:
    now = pl.DataFrame({"kind": ["allocated", "uniform"], "true_bits": [bits] * 2, "predicted_loss": [0.25, 0.5]})
    row = {"kind": ["allocated"], "true_bits": [bits], "kl_mean": [measured], "name": ["ratequant 3.00 bits"]}
    return views.frontier_rows(line_frame(), now, pl.DataFrame(row, schema_overrides={"kl_mean": pl.Float64}))


CHARTS: dict[str, Callable[[], alt.VConcatChart]] = {  # each made once, because that takes time
    "errors": functools.cache(lambda: views.error_map(error_frame())),
    "bits": functools.cache(lambda: views.bit_allocation(bit_frame())),
    "memory": functools.cache(lambda: views.memory_growth(memory_frame())),
    "frontier": functools.cache(lambda: views.frontier(fidelity_frame())),
    "pareto_front": functools.cache(lambda: views.pareto_front(pareto_frame())),
    "allocation": functools.cache(lambda: views.allocation_map(head_frame())),
    "losses": functools.cache(lambda: views.loss_by_layer(loss_frame())),
    "sensitivity": functools.cache(lambda: views.sensitivity_by_layer(sensitivity_frame())),
    "budget": functools.cache(lambda: views.budget_frontier(budget_rows())),
}
BY_LAYER = [name for name in CHARTS if name not in ("frontier", "pareto_front", "budget")]


@functools.cache
def spec_of(name: str) -> Spec:
    """Return the spec of a chart, made once; tests must not change it."""
    return CHARTS[name]().to_dict()


def drawn(chart: alt.TopLevelMixin | Spec, **params: object) -> str:
    bare, rows, values = split(chart if isinstance(chart, dict) else chart.to_dict())
    return picture.svg(join(bare, rows, values | params))


def words(drawing: str) -> list[str]:
    return re.findall(r"<(?:text|tspan)\b[^>]*>([^<]+)<", drawing)


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_has_a_heading_and_draws_the_caption_it_is_given_later(name):
    said = words(drawn(spec_of(name), caption="said later"))
    assert spec_of(name)["title"]["text"] in said
    assert "said later" in said


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_picked_layer_is_marked_and_no_other_time_is_that_colour_used(name):
    assert theme.PICKED not in drawn(spec_of(name))
    assert theme.PICKED in drawn(spec_of(name), picked_layer=2)
    assert theme.PICKED not in drawn(spec_of(name), picked_layer=77)


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_pick_moves_nothing(name):
    drawings = [drawn(spec_of(name), picked_layer=picked) for picked in (None, 0, 3)]
    sizes = [re.search(r'width="(.*?)" height="(.*?)"', drawing).groups() for drawing in drawings]
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_states_its_width(name):
    # "container" freezes a JupyterLab tab
    assert "container" not in json.dumps(spec_of(name))


@pytest.mark.parametrize(
    ("draw", "one", "other", "ends"),
    [
        (views.error_map, lambda: error_frame(scale=0.01), lambda: error_frame(scale=0.02), {"domain": (1e-3, 1)}),
        (views.bit_allocation, lambda: bit_frame(codes=3), lambda: bit_frame(codes=4), {"greatest": 8}),
        (views.memory_growth, lambda: memory_frame(4), lambda: memory_frame(3), {}),
        (views.allocation_map, head_frame, lambda: head_frame(more=1), {"least": 2, "most": 6}),
        (views.loss_by_layer, loss_frame, lambda: loss_frame(scale=2.0), {}),
        (
            views.budget_frontier,
            lambda: budget_rows(3.0),
            lambda: budget_rows(4.0, 0.01),
            {"bits": (2, 6), "domain": (1e-3, 5)},
        ),
    ],
)
def test_a_chart_of_other_numbers_has_the_same_spec(draw, one, other, ends):
    specs = [split(draw(frame(), **ends).to_dict()) for frame in (one, other)]
    assert specs[0][0] == specs[1][0]
    assert specs[0][1] != specs[1][1]


def test_a_large_model_is_drawn_with_at_most_two_thousand_marks_and_says_that_heads_are_grouped():
    frame = error_frame(layers=80, heads=32)
    drawing = drawn(views.error_map(frame))
    assert len(re.findall("<path", drawing)) < 2_000
    assert "KV heads, by 4" in words(drawing)


def test_the_tuners_charts_of_a_large_model_have_at_most_two_thousand_marks():
    for chart in (
        views.allocation_map(head_frame(layers=80, heads=32)),
        views.loss_by_layer(loss_frame(layers=80)),
        views.sensitivity_by_layer(sensitivity_frame(layers=80, heads=32)),
        views.budget_frontier(views.frontier_rows(line_frame(steps=20_000))),
    ):
        assert len(re.findall("<(?:path|line|rect)", drawn(chart))) < 2_000
    assert "KV heads, by 4" in words(drawn(views.allocation_map(head_frame(layers=80, heads=32))))


def test_bytes_beside_the_exact_ones_are_on_a_log_scale_and_close_points_have_one_name():
    two = {"key_bits": 2.25, "value_bits": 2.25, "top1_flips": 0.4, "perplexity": 20.0, "held_bytes": 2_000_000}
    rows = [{"name": f"{method} K2 V2", "kl_mean": kl, **two} for method, kl in (("rvq", 0.43), ("rabitq", 0.44))]
    rows = [{"point": i, **row} for i, row in enumerate([*rows, {**rows[0], "name": "qjl K2 V2", "kl_mean": 4.0}])]
    said = words(drawn(views.frontier(pl.DataFrame(rows), x="held_bytes", exact_bytes=16_000_000)))
    assert said.count("K2 V2") == 2
    assert {"2", "5", "10"} <= {*said}
    assert "exact, in 16 bits" in said


def test_heads_that_are_kept_exact_are_grey_and_counted():
    drawing = drawn(views.allocation_map(head_frame()))
    assert drawing.count(f'fill="{theme.NEUTRAL}"') >= 4
    assert any("keys 3.83 bits on average, 2 to 5; values 3.83" in line for line in words(drawing))
    assert any("grey: 4 kept exact" in line for line in words(drawing))
    coded = head_frame().filter(pl.col("layer") > 0)
    assert "exact" not in views.allocation_caption(coded)
    assert "bits of keys: 3;" in drawing
    assert "predicted loss: 0.25" in drawing


def test_a_plan_that_is_exact_throughout_is_drawn():
    drawing = drawn(views.allocation_map(head_frame(layers=1)))
    assert any("grey: 4 kept exact" in line for line in words(drawing))
    assert "NaN" not in drawing


def test_predicted_losses_are_added_up_and_compared():
    assert views.loss_caption(loss_frame()) == "Predicted, nats a token: allocated 1, uniform 2.5: 2.50 times as much"
    assert views.loss_caption(loss_frame().filter(kind="allocated")) == "Predicted, nats a token: allocated 1"
    by_head = pl.concat([loss_frame(scale=0.5), loss_frame(scale=0.5)])
    assert drawn(views.loss_by_layer(by_head)) == drawn(views.loss_by_layer(loss_frame()))


def test_the_caption_has_the_spread_of_sensitivities_and_counts_values_without_a_logarithm():
    frame = sensitivity_frame()
    said = views.sensitivity_caption(frame)
    assert (
        "keys: mean 1.41× the geometric mean, most in layer 3, head 1" in said
    )  # 1.25 for the heads, 2.5 / 24 ** 0.25 for the layers
    assert "not drawn" not in said
    silent = frame.with_columns(sensitivity=pl.when(pl.col("layer") == 0).then(0.0).otherwise("sensitivity"))
    chart = views.sensitivity_by_layer(silent)
    assert any("4 not drawn: not above zero, or not finite" in line for line in words(drawn(chart)))
    assert "NaN" not in drawn(chart)


def test_predicted_points_are_hollow_and_measured_ones_full():
    def points(rows: pl.DataFrame, role: str) -> list[str]:
        return re.findall(rf"<path[^>]*loss: {role}, [^>]*>", drawn(views.budget_frontier(rows)))

    assert [len(points(budget_rows(), role)) for role in ("predicted", "measured")] == [2, 1]
    assert [len(points(budget_rows(measured=None), role)) for role in ("predicted", "measured")] == [2, 0]
    assert not any("fill=" in point for point in points(budget_rows(), "predicted"))
    assert f'fill="{theme.CHOSEN}"' in points(budget_rows(), "measured")[0]
    assert "0.25" in words(drawn(views.budget_frontier(budget_rows())))


def test_a_long_frontier_is_thinned_and_keeps_its_ends():
    rows = views.frontier_rows(line_frame(steps=1000))
    for kind, own in rows.group_by("kind"):
        whole = line_frame(steps=1000).filter(kind=kind[0])
        assert own.height <= 162
        for end in (pl.Series.min, pl.Series.max):
            assert end(own["true_bits"]) == end(whole["true_bits"])
    assert views.frontier_rows(line_frame()).height == line_frame().height


def test_an_error_that_is_not_finite_is_crossed_and_counted():
    chart = views.error_map(error_frame(rel_mse=math.nan))
    assert words(drawn(chart)).count("×") == 1
    assert any("× 1 not finite" in line for line in words(drawn(chart)))
    assert "×" not in words(drawn(views.error_map(error_frame())))


def test_an_error_of_zero_is_drawn_at_the_floor():
    drawing = drawn(views.error_map(error_frame(rel_mse=0.0)))
    assert "NaN" not in drawing
    assert "×" not in words(drawing)
    assert theme.LOSS["light"][0] in drawing or "rgb(240, 242, 228)" in drawing


@pytest.mark.parametrize(("metric", "of"), [("rel_mse", "of vectors"), ("output_error", "attention output")])
def test_a_relative_error_says_of_what_it_is(metric, of):
    said = words(drawn(views.error_map(error_frame().with_columns(output_error="rel_mse"), metric=metric)))
    assert said.count(of) == 2  # the axis of the lines, and the legend of the maps


def test_a_tensor_without_values_is_left_out():
    said = words(drawn(views.error_map(error_frame(), metric="logit_error")))
    assert "KV head" in said
    assert said.count("keys") == 2  # a name in the legend, and one map
    assert said.count("values") == 1  # in the legend alone


@pytest.mark.parametrize("metric", ["rel_mse", "cosine", "logit_error", "output_error"])
def test_the_worst_layer_is_named(metric):
    assert "most in layer 3" in views.error_caption(error_frame(), metric)


def test_the_bytes_of_layers_add_up():
    said = words(drawn(views.memory_growth(memory_frame(layers=4)), picked_layer=1))
    assert "fp16  32.8 MB" in said
    assert "turboquant  8.19 MB" in said
    assert "layer 1 in turboquant: 2.05 MB" in said
    assert "4.00 times less than fp16 (predicted)" in views.memory_caption(memory_frame())


def test_bits_of_parts_add_up():
    assert "keys 3.25 (3.00 of them codes)" in views.bit_caption(bit_frame())


def test_the_exact_cache_is_in_the_caption_and_not_drawn():
    said = words(drawn(views.frontier(fidelity_frame())))
    assert "none" not in said
    assert any("Exact cache: KL 0, perplexity 16.00" in line for line in said)


def test_every_finite_cache_is_drawn_and_the_others_are_named():
    frame = fidelity_frame().with_columns(held_bits=pl.lit(4.5))
    foreign = {"name": "mlx-lm 4 bits", "key_bits": None, "value_bits": None, "kl_mean": 0.05}
    zero, broken = {"name": "qjl K8 V8", "kl_mean": 0.0}, {"name": "commvq K1 V1", "kl_mean": math.nan}
    row = frame.row(0, named=True)
    frame = pl.concat([frame, pl.DataFrame([row | more for more in (foreign, zero, broken)], schema=frame.schema)])
    drawing = drawn(views.frontier(frame))
    for name in ("mlx-lm 4 bits", "qjl K8 V8"):
        assert f"name: {name};" in drawing
    assert "NaN" not in drawing
    assert any("Not finite: commvq K1 V1." in line for line in words(drawing))


def test_a_front_is_drawn_with_its_intervals_and_unmeasured_candidates_are_counted():
    drawing = drawn(views.pareto_front(pareto_frame()))
    assert "NaN" not in drawing  # an interval that reaches below zero ends at the floor
    assert "exact layers: 0, 29;" in drawing
    assert "qjl" not in drawing
    said = "2 of 5 candidates are on the front; dropped early: 1; not run: 1; not finite: 1."
    assert any(line.startswith(said) for line in words(drawing))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: views.error_map(error_frame(), metric="mse"),
            "metric='mse' cannot be used: give 'rel_mse', 'cosine', ",
        ),
        (
            lambda: views.error_map(error_frame().with_columns(rel_mse=pl.lit(None, pl.Float64))),
            "error_map has no rel_mse to draw",
        ),
        (lambda: views.error_map(error_frame().drop("head")), "error_map needs a column 'head': the frame has layer"),
        (lambda: views.error_map(error_frame().clear()), "error_map needs at least one row: the frame is empty."),
        (
            lambda: views.bit_allocation(bit_frame().with_columns(layer=pl.lit("a"))),
            "bit_allocation needs number in column 'layer': the frame has String there.",
        ),
        (lambda: views.frontier(fidelity_frame(), x="bytes"), "x='bytes' cannot be used: give 'bits' or 'held_bytes'."),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        make()


# ---- the theme


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dim, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#111111"])
def test_every_colour_is_legible_on_white_and_on_the_dark_background(ground):
    colours = [colour for colour, _ in theme.METHODS.values()]
    for colour in [*colours, *theme.TENSORS.values(), theme.PICKED, theme.NEUTRAL, theme.OTHER]:
        assert contrast(colour, ground) >= 3, colour


def test_text_is_legible_on_its_background():
    for mode, ground in (("light", "#ffffff"), ("dark", "#111111")):
        assert contrast(theme.INK[mode]["soft"], ground) >= 4.5
        assert contrast(theme.INK[mode]["strong"], ground) >= 7


def test_the_contrast_of_the_loss_ramp_increases():
    for mode, ground in (("light", "#ffffff"), ("dark", "#111111")):
        steps = [contrast(colour, ground) for colour in theme.LOSS[mode]]
        assert steps == sorted(steps)


def test_no_two_methods_look_alike():
    assert len(set(theme.METHODS.values())) == len(theme.METHODS)
    assert len({colour for colour, _ in theme.METHODS.values()}) == len(theme.METHODS)
    assert theme.look_of("rvq K3 V3")[0] == theme.look_of("rvq")[0] != theme.look_of("mlx-lm 4 bits")[0]


@pytest.mark.parametrize("name", CHARTS)
def test_a_plain_chart_saves_a_live_chart_an_image_and_a_line_in_the_notebook(name):
    data, metadata = CHARTS[name]()._repr_mimebundle_()
    assert data[picture.LIVE]["$schema"].endswith("/v5.json")
    assert data["text/plain"] == describe(data[picture.LIVE], data[picture.LIVE]["datasets"])
    assert "rows" in data["text/plain"]
    output = nbformat.v4.new_output("display_data", data=data, metadata=metadata)
    cell = nbformat.v4.new_code_cell(outputs=[output])
    nbformat.validate(nbformat.v4.new_notebook(cells=[cell]))
    (told,) = (param["value"] for param in data[picture.LIVE]["params"] if param["name"] == "caption")
    alternative = metadata["image/png"]["alt"]
    assert alternative.startswith(title_of(data[picture.LIVE]))
    assert alternative.endswith(told)
    assert len(data["image/png"]) * 3 / 4 < 60_000


def test_a_picture_is_as_wide_as_asked_and_smaller_than_vl_convert_makes_it():
    spec = spec_of("errors")
    for width in (700, 1400):
        assert picture.png_size(picture.png(spec, width=width))[0] == pytest.approx(width, abs=2)
    raw = vl_convert.svg_to_png(picture.svg(spec))
    small = picture.repacked(raw)
    assert len(small) < len(raw) / 2
    assert picture.png_size(small) == picture.png_size(raw)
    before, after = (png_rows(png) for png in (raw, small))
    assert (before[:, 0] == 1).all()  # differences to the pixel on the left, as vl-convert writes them
    assert (after[:, 0] == 0).all()  # pixels
    pixels = after[:, 1:].reshape(len(after), -1, 4)
    left = np.pad(pixels, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    assert np.array_equal(pixels - left, before[:, 1:].reshape(pixels.shape))
    assert picture.repacked(small) == small


def png_rows(png: bytes) -> np.ndarray:
    at, data = 8, b""
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        data += png[at + 8 : at + 8 + length] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + length
    return np.frombuffer(zlib.decompress(data), np.uint8).reshape(picture.png_size(png)[1], -1)


def test_numbers_of_a_saved_chart_have_six_digits():
    chart = alt.Chart(pl.DataFrame({"x": [1 / 3, 2e-9 / 3], "n": [1234567, 2]})).mark_point().encode(x="x", y="n")
    spec = chart._repr_mimebundle_()[0][picture.LIVE]
    assert spec["datasets"]["data-0"] == [{"x": 0.333333, "n": 1234567}, {"x": 6.66667e-10, "n": 2}]


# ---- split specs


@pytest.mark.parametrize("name", CHARTS)
def test_a_spec_that_is_split_and_joined_draws_the_same(name):
    numbered = re.compile(r"(gradient_|clip)\d+")  # vl-convert counts over all its drawings
    whole = vl_convert.vegalite_to_svg(picture.lit(spec_of(name)))
    assert numbered.sub("", drawn(spec_of(name))) == numbered.sub("", whole)


def test_rows_become_json_without_nan_at_any_depth():
    rows = [{"x": math.inf, "y": math.nan, "z": 1.5}]
    _, data, _ = split({"layer": [{"data": {"values": rows}}, {"data": {"values": [1, math.nan], "name": "mine"}}]})
    assert data == {"data-0": [{"x": None, "y": None, "z": 1.5}], "mine": [{"data": 1}, {"data": None}]}


def test_datasets_are_named_in_order_of_appearance_and_once():
    one, other = ({"values": [{"x": i}]} for i in (1, 2))
    spec = {"datasets": {"b": one["values"], "a": other["values"]}}
    spec["layer"] = [{"data": {"name": name}} for name in ("a", "b", "a")]  # type: ignore[assignment]
    bare, data, _ = split(spec)
    assert [layer["data"]["name"] for layer in bare["layer"]] == ["data-0", "data-1", "data-0"]
    assert data == {"data-0": [{"x": 2}], "data-1": [{"x": 1}]}


# ---- log scales


@given(st.lists(st.floats(1e-12, 1e12), min_size=1))
def test_a_log_domain_is_round_and_contains_the_values(values):
    low, high = log_domain(values)
    assert high >= max(values) * (1 - 1e-6)
    assert all(low <= value * (1 + 1e-6) for value in values if value > max(values) * 1e-6)
    assert high / low >= 4.9
    ticks = log_ticks((low, high))
    assert ticks == sorted(set(ticks))
    assert len(ticks) >= 2
    assert all(f"{tick:.0e}"[0] in "125" for tick in ticks)


def test_values_without_a_logarithm_do_not_count():
    assert log_domain([0, -1, math.nan, math.inf, 0.3, 0.004]) == log_domain([0.3, 0.004]) == (0.002, 0.5)
    assert log_domain([]) == log_domain([0])


def test_points_have_shapes_that_can_be_filled():
    """Points are filled and have no outline, so a shape without an inside, such as a stroke, would be invisible."""
    names = [*theme.METHODS, "mlx-lm 4 bit"]
    assert "stroke" not in {theme.look_of(name)[1] for name in names}


def lengths_frame() -> pl.DataFrame:
    rows = [
        {
            "cache": cache,
            "tokens": tokens,
            "prefill_peak_bytes": size,
            "decode_peak_bytes": size,
            "decode_seconds": 0.01,
        }
        for cache, each in (("exact 16 bit", 4000), ("mlx-lm 4 bit", 9000), ("turboquant 4 bit", 1000))
        for tokens in (1024, 2048, 4096)
        for size in [each * tokens]
        if tokens == 1024 or not cache.startswith("mlx-lm")
    ]
    failed = pl.when(pl.col("cache") == "mlx-lm 4 bit").then(None)
    return pl.DataFrame(rows).with_columns(
        failed.otherwise(name).alias(name) for name in ("decode_peak_bytes", "decode_seconds")
    )


def test_costs_by_length_are_drawn_where_they_were_measured():
    chart = views.costs_by_length(lengths_frame()).to_dict()
    drawn = vl_convert.vegalite_to_svg(chart)
    points = re.findall(r'aria-label="tokens of text: [^"]*peak while reading, MB: ([\d.]+); cache: ([^"]*)"', drawn)
    assert {cache for _, cache in points} <= {"exact 16 bit", "mlx-lm 4 bit", "turboquant 4 bit"}
    assert not re.search(r'peak while continuing, MB: [^"]*mlx-lm', drawn)  # a step that failed is no step of 0
    assert re.search(r'peak while reading, MB: [^"]*mlx-lm', drawn)
    caption = views.lengths_caption(lengths_frame())
    assert caption.startswith("At 4,096 tokens turboquant 4 bit peaks at 0.25 of exact 16 bit's memory while reading")
    assert "one more token" in views.lengths_caption(lengths_frame().filter(pl.col("cache") == "exact 16 bit"))
    with pytest.raises(InputError, match="decode_seconds"):
        views.costs_by_length(lengths_frame().drop("decode_seconds"))


def times_frame() -> pl.DataFrame:
    rows = [
        {"cache": cache, "tokens": tokens, "microseconds": time * tokens, "roofline_microseconds": 0.1, "ratio": time}
        for tokens in (4, 8)
        for cache, time in (("exact 16 bit", 1.0), ("mlx-lm 4 bit", 0.25), ("turboquant 4 bit", 0.5))
    ]
    return pl.DataFrame(rows)


def test_attention_times_are_beside_the_times_of_memory_traffic():
    chart = views.attention_times(times_frame()).to_dict()
    panels = chart["vconcat"]
    assert [layer["mark"]["type"] for layer in panels[0]["layer"]] == ["bar", "tick", "text"]
    assert [panel["layer"][0]["transform"][0]["filter"] for panel in panels] == [
        "datum.tokens === 4",
        "datum.tokens === 8",
    ]
    assert views.times_caption(times_frame()).startswith("At 8 tokens turboquant 4 bit takes 0.50 of exact's time")
    assert "measured" in views.times_caption(times_frame().filter(pl.col("cache") == "exact 16 bit"))
    with pytest.raises(InputError, match="roofline_microseconds"):
        views.attention_times(times_frame().drop("roofline_microseconds"))


@pytest.mark.parametrize(("scale", "arrows"), [(0.01, 0), (0.3, 6)])
def test_an_error_above_the_scale_has_an_arrow(scale, arrows):
    """At a scale of 0.3 the last of four layers is above an axis that ends at 1: a mean and two heads, twice."""
    said = words(drawn(views.error_map(error_frame(scale=scale), domain=(1e-4, 1.0))))
    assert said.count("\u25b2") == arrows


def test_bits_above_the_scale_have_an_arrow():
    assert words(drawn(views.bit_allocation(bit_frame(codes=12.0), greatest=9))).count("\u25b2") == 8
    assert "\u25b2" not in words(drawn(views.bit_allocation(bit_frame(), greatest=9)))


def test_plans_have_no_colour_of_keys_or_values():
    assert {theme.KEYS, theme.VALUES}.isdisjoint(colour for colour, _ in KINDS.values())
    assert {theme.KEYS, theme.VALUES}.isdisjoint(SIDES.values())
