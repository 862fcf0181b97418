"""The chart of a memory plan shows in words and bars what fits."""

import re

import polars as pl
import pytest

import veloxlab as vl
from veloxlab import views
from veloxlab.errors import InputError
from veloxlab.views import memory_plan, picture
from veloxlab.views.memory import PARTS, amount

SHAPE = vl.models.ModelShape.typed(layers=32, kv_heads=8, head_dim=128)


def frames(memory: float = 8e9, **settings) -> tuple[pl.DataFrame, pl.DataFrame]:
    planned = vl.measure.plan_memory(SHAPE, context=131_072, **settings)
    return planned, vl.measure.largest_contexts(SHAPE, memory, **settings)


def words(chart) -> list[str]:
    return re.findall(r"<(?:text|tspan)\b[^>]*>([^<]+)<", picture.svg(chart.to_dict()))


def test_totals_the_limit_and_the_largest_contexts_are_labelled():
    planned, largest = frames()
    said = words(memory_plan(planned, largest))
    assert {"4.44 GB, fits", "17.2 GB, does not fit", "9.13 GB, does not fit", "8 GB of memory"} <= {*said}
    assert {f"{tokens:,}" for tokens in largest["tokens"]} <= {*said}
    held = planned.filter(pl.col("cache") == "turboquant K4 V4")["bytes"].sum()
    assert f"{held / 1e9:.3g}" == "4.44"


def test_the_caption_is_of_the_requested_cache():
    said = "2 sequences of 131,072 tokens as turboquant K4 V4: 8.88 GB of 8 GB. At most 118,016 fit, in 16 bits 30,464."
    assert views.plan_caption(*frames(batch=2)) == said
    assert "caption of mine" in words(memory_plan(*frames(), caption="caption of mine"))


def test_a_legend_has_only_existing_parts():
    said = words(memory_plan(*frames()))
    assert "exact window" in said
    assert "states" not in said
    assert "exact window" not in words(memory_plan(*frames(window=0)))


def test_bars_of_a_part_are_as_long_as_its_bytes():
    """The widths of a cache's bars add up to its total, on the scale of the longest."""
    planned, largest = frames()
    drawing = picture.svg(memory_plan(planned, largest).to_dict())
    widths = {}
    for cache, part, path in re.findall(
        r'aria-label="bytes held \(GB\): [^"]*?cache: ([^;"]+); part: ([^;"]+)[^"]*"[^>]*?d="M[\d.]+,[\d.]+h([\d.]+)',
        drawing,
    ):
        widths[cache, part] = float(path)
    names = {part: shown for part, (shown, _) in PARTS.items()}
    sizes = {(row["cache"], names[row["part"]]): row["bytes"] for row in planned.iter_rows(named=True)}
    scale = widths["fp16", "exact tokens"] / sizes["fp16", "exact tokens"]
    assert len(widths) >= 6
    for key, width in widths.items():
        assert width == pytest.approx(scale * sizes[key], abs=0.01)  # pixels, which SVG rounds


def test_sizes_have_three_digits():
    assert [amount(n) for n in (999, 1_000, 1_234_567, 2e12)] == ["999 B", "1 kB", "1.23 MB", "2 TB"]


def test_a_plan_of_several_contexts_or_of_none_is_refused():
    planned, largest = frames()
    two = vl.measure.plan_memory(SHAPE, context=[1000, 2000])
    with pytest.raises(InputError, match="shows one value of 'tokens' and the frame has 2"):
        memory_plan(two, largest)
    with pytest.raises(InputError, match="memory_plan needs at least one row"):
        memory_plan(planned.clear(), largest)
    with pytest.raises(InputError, match="memory_plan needs a column 'memory_bytes'"):
        memory_plan(planned, planned)
