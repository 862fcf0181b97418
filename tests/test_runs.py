"""Kept measurements: runs in a file, two of them paired by window, settings undone, and times by layer."""

import base64
import json
import re
from dataclasses import replace

import polars as pl
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.test_calibration import TEXT
from tests.tiny_models import tiny
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.frames import in_schema
from veloxlab.measure.paired import WINDOWS
from veloxlab.measure.quality import FIDELITY
from veloxlab.measure.times import LAYER_TIMES
from veloxlab.views import times_by_layer, window_losses
from veloxlab.widgets.runs import RUNS, Run, Runs, Steps, apart, change_said, verdict
from veloxlab.widgets.selection import Choice, Fitting, Selection


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def lab(model):
    lab = vl.Lab(model, Letters(), tokens=64, sinks=2, window=8)
    lab.points.windows = 3
    for bits in (2, 8):
        lab.key_bits = lab.value_bits = bits
        lab.measure()
        assert lab.wait(60)
    yield lab
    lab.worker.close()


def run(name="a", kl=(0.25, 0.5, 0.75), text="t", **choice):
    """Return a run with these means of windows."""
    windows = pl.DataFrame({"window": range(len(kl)), "positions": 31, "kl_mean": kl})
    row = in_schema(pl.DataFrame({"name": [name], "kl_mean": [sum(kl) / len(kl)], "top1_flips": [0.25]}), FIDELITY)
    return Run(name, Choice(**choice), "2026-11-30T12:00:00+00:00", text, 7, row, in_schema(windows, WINDOWS))


# runs


def test_runs_are_restored_from_their_file(tmp_path):
    made, again = Runs(), Runs()
    made.add(run(method="rabitq", key_bits=3, sinks=0, own_bits={1: (2, 4.25)}))
    made.add(run("b", (0.5,)))
    again.open(made.save(tmp_path / "runs.parquet"))
    assert again.table.schema == RUNS
    assert again.table.equals(made.table)
    assert again.every[0].choice == made.every[0].choice
    assert again.every[0].windows.equals(made.every[0].windows)
    assert again.table["low"].to_list()[1] is None
    assert [each.seed for each in again.every] == [7, 7]
    again.open(tmp_path / "runs.parquet")
    assert len(again.every) == 4
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="history of runs .*other.parquet cannot be read"):
        again.open(tmp_path / "other.parquet")


def test_a_difference_is_paired_and_marked_if_it_is_not_significant():
    first = run("A")
    assert apart(first, run("B", (0.35, 0.6, 0.85))) == (
        "B loses 0.1 nats a token more than A (95 % interval 0.1 to 0.1, 3 windows)."
    )  # the same difference in each window; windows differ by more
    assert apart(first, run("B", (0.0, 0.6, 0.85))).endswith("3 windows): not decisive.")
    assert apart(first, run("B", (0.35,))).endswith("(one window, so no interval): not decisive.")
    assert "less than A" in apart(first, run("B", (0.2, 0.45, 0.7)))
    assert apart(first, run("B", text="u")) == "A and B cannot be paired: They read different texts."


# steps


@pytest.fixture
def stepping(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("veloxlab.widgets.runs.monotonic", lambda: clock[0])
    selection = Selection(Fitting(), methods=["turboquant", "rabitq"])
    steps = Steps(selection)
    selection.observe(steps.follow, "choice")

    def choose(seconds=5.0, **parts):
        clock[0] += seconds
        selection.choose(**parts)

    return selection, steps, choose


def test_a_choice_can_be_undone_and_redone(stepping):
    selection, steps, choose = stepping
    choose(key_bits=3)
    choose(sinks=0)
    steps.undo()
    assert (selection.choice.key_bits, selection.choice.sinks) == (3, 4)
    steps.undo()
    steps.undo()  # there is no earlier step
    assert selection.choice.key_bits == 4
    steps.redo()
    steps.redo()
    assert (selection.choice.key_bits, selection.choice.sinks) == (3, 0)
    steps.undo()
    choose(window=0)
    steps.redo()  # a new step removes those to redo
    assert (selection.choice.window, selection.choice.sinks) == (0, 4)


def test_moves_of_one_slider_are_one_step_and_another_control_is_another_step(stepping):
    selection, steps, choose = stepping
    for window in (60, 50, 40):
        choose(seconds=0.3, window=window)
    choose(seconds=0.3, sinks=1)
    choose(seconds=2, sinks=2)
    found = []
    for _ in range(3):
        steps.undo()
        found.append((selection.choice.window, selection.choice.sinks))
    assert found == [(40, 1), (40, 4), (64, 4)]


def test_a_change_is_named_by_setting_and_values():
    now = Choice(layer=26, own_bits={26: (5, 4)})
    assert change_said(now, replace(now, own_bits={26: (3, 4)})) == "K bits of layer 26, 5 to 3"
    assert change_said(now, replace(now, own_bits={})) == "K bits of layer 26, 5 to 4"
    assert change_said(now, replace(now, layer=None, token=7)) == "layer, 26 to all; token, the one that lost most to 7"
    other = Choice("rvq", 2, 3, 0, 0, layer=26, own_bits=now.own_bits)
    said = "method, turboquant to rvq; K bits, 4 to 2; V bits, 4 to 3; 2 more"
    assert change_said(now, other) == said


def test_undo_and_redo_name_their_change_and_are_off_without_one():
    lab = vl.Lab(tiny("llama", num_hidden_layers=1), Letters(), tokens=64)
    undo, redo = lab._undo, lab._redo
    assert undo.disabled
    assert redo.disabled
    lab.selection.choose(sinks=1)
    assert (undo.disabled, redo.disabled) == (False, True)
    assert undo.tooltip == "Undo: sinks, 1 to 4"
    undo.click()
    assert (undo.disabled, redo.disabled) == (True, False)
    assert (undo.tooltip, redo.tooltip) == ("Undo: there is nothing", "Redo: sinks, 4 to 1")
    lab.close()


# the page and its report


def test_the_page_of_runs_compares_names_and_uses_them(lab, tmp_path, monkeypatch):
    page = lab.turn_to("runs")
    assert [each.kl.windows for each in lab.points.every] == [3, 3]
    page._lists[0].value, page._lists[1].value = 0, 1
    assert page.pair == lab.points.every
    assert "turboquant K8 V8 loses" in page.summary
    assert "less than turboquant K2 V2" in page.summary
    drawn = page.charts["windows"].frame
    assert drawn["kl_mean"].to_list() == [kl for each in page.pair for kl in each.windows["kl_mean"]]
    page._lists[1].value = 0
    page._name.value = "<coarse>"
    assert lab.points.every[0].name == "<coarse>"
    assert "&lt;coarse&gt;" in page._table.value
    page.use()
    assert (lab.key_bits, lab.value_bits) == (2, 2)
    lab.undo()
    assert lab.key_bits == 8
    lab.redo()
    assert lab.key_bits == 2
    monkeypatch.chdir(tmp_path)
    page.save()
    assert "To read them again: lab.points.open(&quot;runs.parquet&quot;)." in page._message.value
    other = Runs()
    assert other.open("runs.parquet")["name"].to_list() == [run.name for run in lab.points.every]
    assert other.table.equals(lab.points.table)


def test_a_new_page_of_runs_compares_the_two_existing_runs(lab):
    page = lab.turn_to("runs")
    page.close()
    again = lab.turn_to("runs")
    assert [control.value for control in again._lists] == [0, 1]
    assert again.pair[0] is not again.pair[1]


def test_an_interval_is_that_of_fidelity_on_as_many_windows(lab, model):
    newest = lab.points.every[-1]
    again = vl.fidelity(
        model, Letters(), newest.choice.plan(model), tokens=64, windows=3, name=newest.row["name"].item()
    )
    assert again.equals(newest.row)
    assert newest.kl.mean == pytest.approx(again["kl_mean"].item())


def test_a_run_keeps_its_seed(lab, model):
    assert lab.points.every[-1].seed == vars(find_method("turboquant").codec(64, 4, "keys"))["seed"]
    fitted = vl.calibrate(model, Letters(), "vecinfer", text=TEXT, bits=2, tokens=128, seed=5)
    other = vl.Lab(model, Letters(), method="vecinfer", bits=2, calibration=fitted, tokens=64)
    other.measure()
    assert other.wait(60)
    assert other.points.table["seed"].to_list() == [5]
    other.close()


def test_a_report_of_the_laboratory_begins_with_the_answer_and_contains_its_notebook(lab, tmp_path):
    text = lab.export(tmp_path / "lab.html").read_text()
    assert f"<h1>{lab.name} on the model that was measured</h1>" in text
    first, second = re.findall(r"<h2>(.*?)</h2>", text)[:2]
    assert first.startswith("What does turboquant K8 V8 change")
    assert second == lab.selection.choice.name
    book = json.loads(base64.b64decode(re.search(r"x-ipynb\+json;base64,([^\"]*)", text)[1]))
    code = "\n".join(cell["source"] for cell in book["cells"] if cell["cell_type"] == "code")
    space = {}
    exec(re.search(r"(?m)^plan = .*$", code)[0], {"vl": vl}, space)
    assert space["plan"] == lab.plan
    assert "windows=3" in code


# times


def test_times_of_layers_are_beside_their_bytes(model):
    seen = vl.capture(model, Letters(), tokens=64)
    frame = vl.measure.layer_times(model, seen, "rabitq", bits=2, sinks=0, window=0)
    assert frame.schema == LAYER_TIMES
    assert frame.group_by("side", maintain_order=True).agg(pl.col("part").unique().sort())["part"].to_list() == [
        ["attend", "store"],
        ["attend", "decode", "store"],
    ]
    assert frame["layer"].unique().to_list() == [0, 1]
    assert (frame["microseconds"] > 0).all()
    cache = vl.make_cache(model, "rabitq", bits=2, sinks=0, window=0)
    for layer, one in zip(seen.layers, cache, strict=True):
        one.update_and_fetch(layer.keys, layer.values)
        held = frame.filter(side="compressed", layer=layer.layer)["held_bytes"].unique().to_list()
        assert held == [one.nbytes]
    assert times_by_layer(frame).to_dict()["title"]["text"] == "Time of each layer"
    with pytest.raises(InputError, match="capture is of another model"):
        vl.measure.layer_times(tiny("llama", num_hidden_layers=1), seen)


def test_the_page_of_times_measures_on_request(lab):
    page = lab.turn_to("times")
    assert page.summary == "nothing was timed yet"
    page.time()
    assert lab.wait(60)
    assert page.charts["times"].frame.height == page.timed.height == 2 * 5
    assert page.summary.startswith(f"{lab.selection.choice.name}: All layers, over the exact cache's time")


def test_windows_without_loss_are_drawn_too():
    frame = run(kl=(0.0, 0.25)).windows.with_columns(pl.lit(0.1).alias("top1_flips"), cache=pl.lit("a"))
    assert "Mean KL in nats: a 0.125." in json.dumps(window_losses(frame).to_dict())


@pytest.mark.parametrize(
    ("kl", "said"),
    [
        (0.01, "within the limits of the page Advise for all uses: chat, retrieval, draft."),
        (0.05, "above the limits of the page Advise for retrieval (0.02): try more K bits"),
        (float("nan"), "above the limits of the page Advise for chat (0.05), retrieval (0.02), draft (0.2)"),
    ],
)
def test_a_loss_is_compared_with_the_limits_of_each_use(kl, said):
    assert said in verdict(kl)


def test_the_newest_run_has_its_verdict(lab):
    assert lab.points.newest.endswith(verdict(lab.points.every[-1].kl.mean))
