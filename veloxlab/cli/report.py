"""The command that measures one cache and writes a report, a page that needs neither Jupyter nor a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl

from veloxlab.cache.plan import Plan
from veloxlab.measure.paired import Mean
from veloxlab.measure.reproduce import Step, calibration_code, notebook, run, steps
from veloxlab.progress import say
from veloxlab.store import check_place, write_atomically
from veloxlab.views import bytes_caption
from veloxlab.views.picture import Section, report, table_of
from veloxlab.widgets.chart_view import ensure_bundle

MB = 1e6
NAMED = 2  # layers with other bits that a title lists


def write_report(
    model: str, plan: Path, out: Path, calibration: Sequence[Path] = (), seed: int = 0, **settings: Any
) -> None:
    """Measure the cache of a plan, print the summary, and write the page."""
    check_place(out)
    wanted = Plan.load(plan)
    cells = [*steps(model, wanted, calibration_code(wanted, calibration, seed), **settings)]
    shown, space = run(cells, say)
    title = f"{name_of(wanted) or plan.stem} on {model}"
    sections = [first_section(title, space), *sections_of(cells, shown)]
    page = report(title, sections, ensure_bundle().read_text("utf-8"), notebook(title, cells))
    print(sections[0].words)
    print(f"The page is {write_atomically(out, page.encode())}.")


def name_of(plan: Plan) -> str:
    """A plan's name, and the bits of layers that differ from most."""
    said = [f"{layer.key_method} K{layer.key_bits} V{layer.value_bits}" for layer in plan.layers]
    method = plan.name.split(" ")[0] + " "
    others = [f"layer {i} {each.removeprefix(method)}" for i, each in enumerate(said) if each != plan.name]
    if plan.name not in said or not others:
        return plan.name
    return ", ".join([plan.name, *(others if len(others) <= NAMED else [f"{len(others)} layers with other bits"])])


def first_section(title: str, space: Mapping[str, Any]) -> Section:
    """The first section: question, answer and numbers, from the namespace of the cells of `steps`."""
    windows, layers, said, plan = (space[name] for name in ("windows", "layers", "predictions", "plan"))
    kl = Mean.of(windows["kl_mean"].to_list())
    held = layers.drop_nulls("layer")
    tokens = held["tokens"].max()
    answer = (
        f"Texts of {tokens:,} tokens are read, of which {plan.sinks} sinks and a window of {plan.window} stay exact. "
        f"Predictions move by {kl.mean:.3g} nats a token ({kl.interval}); {said['flip'].mean():.1%} of tokens get "
        f"another first choice. After {tokens:,} tokens the cache holds {bytes_caption(layers)}"
    )
    perplexity = {name: exp(said[name].mean()) for name in ("nll", "nll_exact")}
    numbers = [
        ("KL, nats a token", kl.mean, 0.0),
        ("other first choice, share of tokens", said["flip"].mean(), 0.0),
        ("perplexity", perplexity["nll"], perplexity["nll_exact"]),
        (f"MB held for {tokens:,} tokens", held["held_bytes"].sum() / MB, held["fp16_bytes"].sum() / MB),
        ("true bits of a key's coordinate, mean of layers", held["key_bits"].mean(), 16.0),
        ("true bits of a value's coordinate, mean of layers", held["value_bits"].mean(), 16.0),
    ]
    frame = pl.DataFrame(numbers, schema=["what", "this cache", "exact cache"], orient="row")
    return Section(f"What does {title} change, and what does it hold?", answer, table=frame)


def sections_of(cells: Sequence[Step], shown: Sequence[Any]) -> list[Section]:
    """Charts, and collapsed tables, in the order of the cells."""
    made = []
    for cell, found in zip(cells, shown, strict=True):
        if isinstance(found, pl.DataFrame):
            made.append(Section(cell.title, cell.words, table=found, folded=table_of(found)))
        else:
            assert isinstance(found, alt.TopLevelMixin)  # `steps` shows frames and charts
            made.append(Section(chart=found.to_dict()))
    return made
