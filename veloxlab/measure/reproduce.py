"""Measurements of one cache as Python code: the code of a report, and a notebook that runs it again."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veloxlab.cache.plan import Plan
from veloxlab.codecs import find_method
from veloxlab.progress import Progress, silent

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


@dataclass(frozen=True)
class Step:
    """One cell: its purpose and its code. The value of its last line is shown."""

    title: str
    words: str
    code: str


def steps(
    model: str,
    plan: Plan,
    calibration: str = "[]",
    *,
    text: str | None = None,
    tokens: int = 512,
    windows: int = 4,
    tasks: Sequence[str] = (),
    questions: int = 16,
) -> Iterator[Step]:
    """Yield the steps that measure the cache of a plan on a model.

    ``model``: as for `veloxlab.load`. ``calibration``: Python code for the calibrations of the plan.
    ``text``: text to read; the shipped WikiText-2 test excerpt by default. ``tasks``: as for `veloxlab.evaluate`.
    """
    given = "" if text is None else f"text={text!r}, "
    yield Step(
        "The model and the cache",
        "The plan has the method and the bits of every layer.",
        f"import veloxlab as vl  # before mlx\nimport mlx.core as mx\n\nmodel, tokenizer = vl.load({model!r})\n"
        f"plan = vl.Plan.from_json({json.dumps(json.loads(plan.to_json()))!r})\n"
        f"calibration = {calibration}\nplan.frame",
    )
    yield Step(
        "Predictions, window by window",
        "Each window is read twice, by the exact cache and through the codes. KL is in nats a token.",
        f"exact = vl.measure.reference(model, tokenizer, {given}tokens={tokens}, windows={windows})\n"
        "predictions = vl.measure.fidelity_to(exact, plan, per_token=True, calibration=calibration)\n"
        "windows = vl.measure.by_window(predictions)\nwindows",
    )
    yield Step("", "", "vl.views.kl_along(predictions)")
    yield Step(
        "Bytes held, layer by layer",
        "Measured: one window of text in the cache that generation uses, and exact keys and values in 16 bits. Layers "
        "encode their blocks in different steps, so some hold up to a block of exact tokens more than others.",
        "cache = vl.make_cache(model, plan, calibration=calibration)\n"
        "mx.eval(model(mx.array([exact.stretches[0]]), cache=cache))\nlayers = vl.report(cache)\nlayers",
    )
    yield Step("", "", "vl.views.bytes_by_layer(layers)")
    if tasks:
        yield Step(
            "Questions asked through the cache",
            "Right answers with the exact cache and with this one, and the difference with its 95 % interval.",
            f"answers = vl.evaluate(model, tokenizer, plan, tasks={[*tasks]!r}, questions={questions}, "
            "calibration=calibration)\nanswers",
        )
        yield Step("", "", "vl.views.task_scores(answers)")


def calibration_code(plan: Plan, files: Sequence[Path] = (), seed: int = 0) -> str:
    """Return Python code for the calibrations of a plan: loaded from files, or fitted with a seed if there are none."""
    found = [f"vl.Calibration.load({str(Path(file).absolute())!r})" for file in files]
    if not files:
        found = [
            f"vl.calibrate(model, tokenizer, {method!r}, bits={widths}{f', {seed=}' if seed else ''})"
            for method, widths in plan.method_widths.items()
            if find_method(method).calibrated or method in plan.calibrations
        ]
    return f"[{', '.join(found)}]"


def run(cells: Sequence[Step], progress: Progress = silent) -> tuple[list[Any], dict[str, Any]]:
    """Run the cells in one namespace; return the value of each cell's last line, and the namespace."""
    space: dict[str, Any] = {}
    shown = []
    for i, cell in enumerate(cells):
        progress(i, len(cells), cell.title or "drawing")
        *lines, last = ast.parse(cell.code).body
        assert isinstance(last, ast.Expr)  # true for cells of `steps`
        exec(compile(ast.Module(lines, []), "<report>", "exec"), space)
        shown.append(eval(compile(ast.Expression(last.value), "<report>", "eval"), space))
    progress(len(cells), len(cells), "done")
    return shown, space


def notebook(title: str, cells: Sequence[Step]) -> bytes:
    """Return a Jupyter notebook (format 4.5) of the cells, without outputs."""
    made: list[dict[str, Any]] = [_cell("markdown", f"# {title}")]
    for cell in cells:
        made += [_cell("markdown", f"## {cell.title}\n\n{cell.words}")] if cell.title else []
        made.append(_cell("code", cell.code) | {"execution_count": None, "outputs": []})
    whole = {"cells": [each | {"id": f"cell-{i}"} for i, each in enumerate(made)]}
    return json.dumps(whole | {"metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}).encode()


def _cell(kind: str, text: str) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": text}
