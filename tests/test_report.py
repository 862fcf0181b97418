"""The page about one cache: its numbers are those of its notebook's code, and it needs no network."""

import ast
import base64
import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace

import mlx.core as mx
import nbformat
import polars as pl
import pytest

import veloxlab as vl
from tests.letters import Readable
from tests.tiny_models import tiny
from veloxlab.cli import main
from veloxlab.cli.report import name_of
from veloxlab.errors import InputError
from veloxlab.measure.paired import Mean, by_window, difference
from veloxlab.measure.reproduce import calibration_code, notebook, run, steps
from veloxlab.views import bytes_caption

TEXT = "so it goes, one letter after another, and </script><!-- nobody minds. " * 12


@pytest.fixture(scope="module")
def loaded():
    """A small model instead of the result of ``vl.load``."""
    both = tiny("llama"), Readable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl, "load", lambda name: both, raising=False)
        yield both


@pytest.fixture(scope="module")
def page(loaded, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("report")
    plan = vl.Plan.uniform(loaded[0], bits=3, sinks=2, window=8).with_layer(1, key_bits=5)
    path, out = plan.save(tmp_path / "plan.json"), tmp_path / "report.html"
    given = ["--tokens", "96", "--windows", "3", "--tasks", "copy", "--questions", "4", "--out", str(out)]
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["report", "a<b>", "--plan", str(path), *given]) == 0
    return out.read_text(), printed.getvalue()


def held_notebook(text):
    return nbformat.reads(base64.b64decode(re.search(r"x-ipynb\+json;base64,([^\"]*)", text)[1]).decode(), as_version=4)


def test_a_report_has_the_numbers_of_its_notebook(loaded, page):
    text, printed = page
    book = held_notebook(text)
    nbformat.validate(book)
    space = {}
    for cell in book.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "<cell>", "exec"), space)
    kl = Mean.of(space["windows"]["kl_mean"].to_list())
    assert f"move by {kl.mean:.3g} nats a token ({kl.interval})" in printed
    assert kl.windows == 3
    own = vl.fidelity(*loaded, space["plan"], tokens=96, windows=3).row(0, named=True)
    # a mean of windows of equal length is the mean of their tokens
    assert own["kl_mean"] == pytest.approx(kl.mean)
    numbers = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>", text))
    assert float(numbers["perplexity"]) == pytest.approx(own["perplexity"], rel=1e-3)  # four digits
    held = vl.report(space["cache"]).drop_nulls("layer")
    assert float(numbers["MB held for 96 tokens"]) == pytest.approx(held["held_bytes"].sum() / 1e6, rel=1e-3)


def test_a_report_stands_alone_and_escapes_what_it_shows(page):
    text, _ = page
    assert "<h1>turboquant K3 V3, layer 1 K5 V3 on a&lt;b&gt;</h1>" in text
    assert text.index("<h2>What does turboquant K3 V3, layer 1 K5 V3 on a&lt;b&gt; change") < text.index(
        'class="chart"'
    )
    assert text.count('<div class="chart"') == 3
    assert "Table of 1 row<" in text
    assert "Layers encode their blocks in different steps" in text
    tags = re.findall(r"<[a-zA-Z][^>]*>", re.sub(r"(?s)<script.*?</script>", "", text))
    assert not [tag for tag in tags if re.search(r"(src|href|url)\s*=?\s*[\"'(]?\s*(https?:)?//", tag)]
    assert "<b>" not in "".join(tags)


def test_a_report_is_named_by_its_plan_and_the_layers_that_differ(loaded):
    plan = vl.Plan.uniform(tiny("llama", num_hidden_layers=4), bits=4)
    assert name_of(plan) == "turboquant K4 V4"
    for layer in range(2):
        plan = plan.with_layer(layer, key_bits=2)
    assert name_of(plan) == "turboquant K4 V4, layer 0 K2 V4, layer 1 K2 V4"
    assert name_of(plan.with_layer(2, value_bits=3)) == "turboquant K4 V4, 3 layers with other bits"
    assert name_of(replace(plan, name="mine")) == "mine"
    assert name_of(replace(plan, name="")) == ""


def test_the_answer_of_a_report_states_its_number_of_tokens(page):
    _, printed = page
    assert printed.startswith("Texts of 96 tokens are read, of which 2 sinks and a window of 8 stay exact. Predictions")
    assert "After 96 tokens the cache holds " in printed


def test_a_cache_that_holds_more_than_exact_states_why(loaded):
    cache = vl.make_cache(loaded[0])
    said = []
    for count in (8, 600):
        loaded[0](mx.array([[1] * count]), cache=cache)
        said.append(bytes_caption(vl.report(cache)))
    assert ", more than exact in 16 bits (0.00819 MB), as many tokens stay in" in said[0]
    assert " times less than exact in 16 bits" in said[1]


def test_a_text_with_markup_stays_a_text(loaded):
    plan = vl.Plan.uniform(loaded[0], bits=4)
    cells = [*steps("x'\"", plan, text=TEXT, tokens=64, windows=1)]
    shown, space = run(cells)
    assert [type(each).__name__ for each in shown] == [
        "DataFrame",
        "DataFrame",
        "VConcatChart",
        "DataFrame",
        "VConcatChart",
    ]
    assert space["exact"].stretches == (Readable().encode(TEXT)[:64],)
    assert space["plan"] == plan
    code = [cell["source"] for cell in json.loads(notebook("t", cells))["cells"] if cell["cell_type"] == "code"]
    assert code == [cell.code for cell in cells]
    assert all(ast.parse(each) for each in code)


def test_a_plan_that_needs_a_calibration_has_the_code_for_it(loaded, tmp_path):
    plan = vl.Plan.uniform(loaded[0], "commvq", bits=2)
    assert calibration_code(plan, []) == "[vl.calibrate(model, tokenizer, 'commvq', bits=[2])]"
    file = tmp_path / "it's.safetensors"
    assert calibration_code(plan, [file]) == f"[vl.Calibration.load({str(file)!r})]"
    assert calibration_code(vl.Plan.uniform(loaded[0]), []) == "[]"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    assert main(["report", "x", "--plan", "none.json", "--out", str(tmp_path / "no" / "report.html")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_a_plan_is_its_own_json(loaded):
    plan = vl.Plan.uniform(loaded[0], bits=3)
    assert vl.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(InputError, match="^This plan cannot be read .*checksum does not match.*give what plan.to_json"):
        vl.Plan.from_json(plan.to_json().replace('"sinks": 4', '"sinks": 5'))


def test_caches_are_compared_window_by_window():
    rows = [
        (w, p, 5, kl, False, 2.0, 1.0) for w, mean in enumerate((0.1, 0.3)) for p, kl in enumerate((mean, mean + 0.2))
    ]
    first = by_window(
        pl.DataFrame(rows, schema=["window", "position", "token", "kl", "flip", "nll", "nll_exact"], orient="row")
    )
    assert first["kl_mean"].to_list() == pytest.approx([0.2, 0.4])
    assert first["perplexity"].to_list() == pytest.approx([2.718282**2] * 2)
    found = difference(first, first.with_columns(pl.col("kl_mean") + pl.Series([0.09, 0.11])))
    assert found.mean == pytest.approx(0.1)
    assert found.windows == 2
    # Student's t of one degree: 12.706 times the standard error, which is 0.01
    assert [found.low, found.high] == pytest.approx([0.1 - 0.12706, 0.1 + 0.12706], abs=1e-4)
    assert not found.decisive
    assert difference(first, first.with_columns(pl.col("kl_mean") + 0.1)).decisive
    assert difference(first, first.head(1)).interval == "one window, so no interval"
    with pytest.raises(InputError, match="different windows"):
        difference(first.head(1), first.tail(1))
