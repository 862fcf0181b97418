"""The laboratory's pages: each is made when it is opened, and all share one choice. Small model, random weights."""

import json
import threading
from pathlib import Path

import ipywidgets
import mlx.core as mx
import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import controls, turn
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.cache.counts import calls
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import LayerFacts
from veloxlab.views.picture import png_size
from veloxlab.widgets import ChartView, ProgressBar
from veloxlab.widgets.lab import NAMES
from veloxlab.widgets.lab import PAGES as KINDS
from veloxlab.widgets.lifetime import TABLE, parts
from veloxlab.widgets.pages.cache import CachePage, unusual

PAGES = [name for name in NAMES if name not in ("cache", "compare")]
MEASURING = ("cache", "errors", "keys", "tokens", "memory")  # pages that measure when they are opened


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lab = vl.Lab(tiny("llama"), Letters(), tokens=128, sinks=2, window=16)
        assert lab.wait(120)
        yield lab
        lab.worker.close()


@pytest.fixture(autouse=True)
def _as_it_was(lab):
    yield
    lab.page, lab.method, lab.layer, lab.head = "cache", "turboquant", None, 0
    lab.selection.choose(own_bits={}, layer=None)
    lab.key_bits = lab.value_bits = 4
    lab.sinks, lab.window = 2, 16
    assert lab.wait(120)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_made_when_it_is_opened_and_once(lab, page):
    first = lab.turn_to(page)
    assert lab.page == page
    assert lab._tabs.selected_index == NAMES.index(page)
    assert first.worker is lab.worker
    assert lab._places[page].children == (first,)
    lab._tabs.selected_index = 0
    assert lab.page == "cache"
    assert lab.turn_to(page) is first


def test_a_page_that_is_opened_during_other_work_appears_at_once(lab):
    """It shows its controls, and the job that it waits for. After a cancel of that job its charts appear."""
    charts = {name: [*lab.turn_to(name).named] for name in NAMES}
    for page in lab.pages.values():
        page.close()
    lab.selection.kept.clear()
    pressed, told, ended = threading.Event(), threading.Event(), []

    def work(progress):
        progress(3, 12, "long work")
        told.set()
        pressed.wait(60)
        progress(4, 12, "long work")
        ended.append("work")

    lab.worker.submit("long", work)
    assert told.wait(60)
    for name in ("advise", *(name for name in NAMES if name != "advise")):
        lab.page = name
        page = lab.pages[name]
        assert lab._places[name].children == (page,)
        assert "method" in controls(page) or name in ("advise", "compare", "runs", "times", "budget")
        waits = name in ("advise", "budget") or (charts[name] and not page.named)
        assert ("This page waits for other work: long work (3 of 12)." in page._bar.before.value) == bool(waits), name
        if name in ("cache", "errors", "keys", "tokens", "memory"):
            assert waits
            assert "Each chart appears when it is measured" in page._message.value
            assert [type(widget) for widget in page._grid.children] == [ipywidgets.HTML] * len(charts[name])
            assert page.summary
    assert lab.pages["advise"].advice is None
    controls(page)["Cancel"].click()
    pressed.set()
    assert lab.wait(120)
    assert ended == []
    for name in NAMES:
        page = lab.turn_to(name)
        assert page._bar.before.value == "", name
        assert name not in MEASURING or page._message.value == "", name
        assert [*page.named] == charts[name], name
    assert lab.pages["advise"].advice is not None


def test_a_page_without_results_says_what_to_press(lab):
    lab.turn_to("generation").close()
    assert "Press Generate: the answers" in lab.turn_to("generation")._message.value


def test_cancel_names_the_page_whose_work_it_stops_and_only_that_page_offers_retry(lab):
    started, go = threading.Event(), threading.Event()

    def slow(progress):
        started.set()
        go.wait(60)
        progress.check()

    of_tokens, of_cache = (lab.turn_to(page)._bar.children[2] for page in ("tokens", "cache"))
    lab.worker.submit("tokens: slow", slow)
    assert started.wait(60)
    assert of_cache.tooltip.startswith("Stop the work of the page Tokens that runs now")
    of_cache.click()
    go.set()
    assert lab.wait(120)
    assert of_cache.layout.visibility == "hidden"
    lab.turn_to("tokens")
    assert (of_tokens.layout.visibility, of_tokens.description) == ("visible", "Retry")
    of_tokens.click()
    assert lab.wait(120)
    assert of_tokens.layout.visibility == "hidden"


def test_a_chart_that_is_not_measured_yet_is_refused_in_a_sentence(lab):
    lab.turn_to("memory").close()
    lab.selection.kept.clear()
    pressed = threading.Event()
    lab.worker.submit("long", lambda _: pressed.wait(60))
    lab.page = "cache"
    lab.page = "memory"
    page = lab.pages["memory"]
    with pytest.raises(InputError, match="'memory_plan' is not measured yet: wait for it with wait"):
        _ = page.chart
    page.leave_room()
    assert "There is no plan yet" in page._message.value
    pressed.set()
    assert lab.wait(120)
    assert page.chart.frame.height


@pytest.mark.parametrize("page", NAMES)
def test_a_closed_page_is_made_again_with_the_choice_and_measurements(lab, page):
    turn(lab, method="rabitq")
    if lab.measured.is_empty():
        lab.measure()
        assert lab.wait(120)
    first, charts = lab.turn_to(page), {*lab.turn_to(page).named}
    first.close()
    assert page not in lab.pages
    assert repr(lab).startswith("Lab(rabitq K4 V4")
    second = lab.turn_to(page)
    assert second is not first
    assert lab._places[page].children == (second,)
    assert {*second.named} == charts
    assert repr(first) == f"{type(second).__name__}(closed)"
    assert page == "compare" or second.selection.choice.method == "rabitq"
    assert len(lab.comparison._list.options) == len(lab.measured) > 0


def test_a_choice_on_one_page_counts_on_all(lab):
    keys, errors, plans, texts = (lab.turn_to(page) for page in ("keys", "errors", "memory", "generation"))
    turn(lab, page="keys")
    turn(keys, layer=1, head=1, method="rabitq")
    assert (lab.layer, lab.head, lab.method) == (1, 1, "rabitq")
    assert lab.errors.picked is None  # a hidden page follows when it is shown
    turn(lab, page="cache")
    assert lab.errors.picked == 1
    turn(lab, page="errors")
    assert (errors.layer, errors.head, errors.method) == (1, 1, "rabitq")
    assert "Layer 1" in keys.charts["spectrum"].content["params"]["caption"]

    turn(errors, bits=3)  # of all layers: no layer has bits of its own
    assert lab.layer_bits == {0: (3, 4), 1: (3, 4)}
    assert errors._message.value == ""
    turn(lab, page="memory")
    assert (plans.method, plans.key_bits, plans.value_bits, plans.window) == ("rabitq", 3, 4, 16)
    turn(plans, value_bits=2, window=32)
    assert (lab.window, lab.layer_bits[0]) == (32, (3, 2))
    turn(lab, page="generation")
    assert (texts.method, texts.key_bits, texts.value_bits, texts.window) == ("rabitq", 3, 2, 32)


def test_a_layer_that_has_bits_of_its_own_keeps_and_shows_them(lab):
    turn(lab, layer=1)
    turn(lab, key_bits=8)
    errors = lab.turn_to("errors")
    assert (errors.layer, errors.bits) == (1, 8)
    turn(errors, bits=7)
    assert lab.layer_bits == {0: (4, 4), 1: (7, 4)}
    assert "These are bits of layer 1 alone." in errors._banner.value
    turn(errors, layer=0)
    assert errors.bits == 4
    turn(errors, bits=5)
    assert lab.layer_bits == {0: (5, 4), 1: (7, 4)}
    assert "These are bits of all layers except 1." in errors._banner.value
    plans = lab.turn_to("memory")
    assert plans.key_bits == 5


def test_the_memory_page_plans_layers_that_have_bits_of_their_own(lab):
    plans = lab.turn_to("memory")
    turn(lab, key_bits=4, value_bits=4)
    equal = plans.plan.filter(cache="turboquant K4 V4", part="codes")["bytes"].sum()
    turn(plans, method="turboquant")
    lab.selection.choose(own_bits={0: (2, 2)})
    assert lab.wait(120)
    name = "turboquant K4 V4, layer 0 K2 V2"
    codes = plans.plan.filter(cache=name, part="codes")["bytes"].sum()
    assert codes == pytest.approx(equal * 3 / 4, rel=1e-3)  # of two layers, one has half the bits
    assert name in plans._losses.value
    assert plans.loss(name).source == "not known before a run"
    space = {"vl": vl, "model": lab.experiment.model}
    exec(plans._code.value, space)
    assert space["plan"].layers == lab.plan.layers
    turn(plans, model="1B, as Llama 3.2")
    assert plans.plan["cache"][0] == "turboquant K4 V4"
    assert "the plan is for turboquant K4 V4." in plans._banner.value
    turn(plans, model="this model")


def test_the_bits_of_a_page_that_shows_values_are_those_of_values(lab):
    keys = lab.turn_to("keys")
    turn(keys, tensor="values")
    turn(keys, bits=6)
    assert (lab.key_bits, lab.value_bits) == (4, 6)
    turn(keys, tensor="keys")


def test_an_impossible_choice_is_reported_on_its_page_and_nothing_else_changes(lab):
    keys = lab.turn_to("keys")
    turn(lab, method="polarquant")
    with pytest.raises(InputError, match="Keys at bits=1 are out of range"):
        keys.bits = 1
    assert (keys.bits, lab.key_bits) == (4, 4)


def test_a_method_that_learns_is_fitted_when_it_is_chosen(lab):
    turn(lab, method="spectralquant")
    assert lab.worker.last_error is None
    assert lab.name == "spectralquant K4 V4"
    calibration = lab.selection.fitting.calibration("spectralquant", [4])
    expected = vl.measure.layer_errors(
        lab.experiment.capture, "spectralquant", bits=4, sinks=2, window=16, calibration=calibration
    )
    shown = lab.errors.frame.filter(tensor="keys")["output_error"].sum()
    assert shown == pytest.approx(expected.filter(tensor="keys")["output_error"].sum(), rel=1e-6)
    assert 'vl.calibrate(model, tokenizer, "spectralquant", bits=[4])' in lab.pages["cache"]._code.value
    turn(lab, value_bits=2)
    assert lab.selection.fitting.calibration("spectralquant", [2, 4]).widths == [2, 4]
    turn(lab, page="keys")
    keys = lab.turn_to("keys")
    assert (keys.method, keys.bits, keys.problem) == ("spectralquant", 4, "")
    errors = lab.turn_to("errors")
    assert "are drawn where spectralquant is calibrated: choose other bits" in errors._banner.value
    turn(lab, method="turboquant")
    assert "calibrated" not in errors._banner.value


def test_methods_are_measured_side_by_side_and_a_point_can_be_chosen_again(lab):
    turn(lab, layer=1)
    turn(lab, key_bits=8)
    before = len(lab.measured)
    lab.measure()
    assert lab.wait(120)
    measured = lab.state
    turn(lab, layer=None)
    lab.compare()
    assert lab.wait(300)
    names = lab.measured["name"].to_list()[before:]
    assert names[0] == "turboquant K4 V4, layer 1 K8 V4"
    assert {name.split(" ")[0] for name in names[1:]} >= {"turboquant", "rvq", "rabitq", "qjl", "polarquant"}
    assert len(lab.frontier.frame) == len(lab.measured)
    lab.comparison._list.value = before + names.index("rabitq K4 V4")
    lab.comparison._take.click()
    assert lab.wait(120)
    assert (lab.method, lab.layer_bits[1]) == ("rabitq", (4, 4))
    lab.comparison._list.value = before
    lab.comparison._take.click()
    assert lab.wait(120)
    assert lab.state == measured


def test_a_control_that_changes_while_methods_are_measured_changes_no_point(lab):
    def measured() -> tuple[list, list]:
        rows, settings = lab.measured[before:], [run.choice for run in lab.points.every[before:]]
        return rows.select("name", "held_bytes", "kl_mean").rows(), [point.window for point in settings]

    before = len(lab.measured)
    lab.compare()
    assert lab.wait(300)
    rows, windows = measured()
    before = len(lab.measured)
    lab.compare()
    lab.window = 96
    assert lab.wait(300)
    assert measured() == (rows, windows)
    assert set(windows) == {16}


def test_measured_methods_and_a_cancelled_fit_are_reported(lab):
    lab.measure()
    assert lab.wait(120)
    message = lab.pages["cache"]._message
    assert "Measured turboquant K4 V4: mean KL" in message.value
    started = threading.Event()
    end = lab.worker.watch(lambda status: started.set() if status.label.startswith("fitting") else None)
    lab.method = "vecinfer"
    assert started.wait(60)
    lab.worker.cancel()
    assert lab.wait(120)
    end()
    assert "Cancelled. The charts show the last settings" in message.value
    assert set(lab.memory.frame["cache"]) == {"fp16", "turboquant"}

    # no other page starts it again; Retry does
    fitted = lab.selection.fitting.is_ready
    errors = lab.turn_to("errors")
    assert "The fit of vecinfer at 4 bits was cancelled: press Retry" in errors.problem
    assert not fitted("vecinfer", 4)
    lab.turn_to("cache")
    assert not fitted("vecinfer", 4)
    controls(lab.pages["cache"])["Retry"].click()
    assert lab.wait(120)
    assert fitted("vecinfer", 4)
    assert set(lab.memory.frame["cache"]) == {"fp16", "vecinfer"}


def test_bits_that_a_method_does_not_have_are_kept_as_a_wish_and_reported(lab):
    turn(lab, key_bits=7, value_bits=3)
    banner = lab.pages["cache"]._banner
    turn(lab, method="rvq")
    assert (lab.key_bits, lab.value_bits) == (6, 2)
    assert "K7 V3 became K6 V2" in banner.value
    turn(lab, method="turboquant")
    assert (lab.key_bits, lab.value_bits) == (7, 3)
    assert "became" not in banner.value
    turn(lab, method="rvq", key_bits=4)  # a number that the user chose is the new wish
    turn(lab, method="turboquant")
    assert (lab.key_bits, lab.value_bits) == (4, 3)


def test_layers_with_bits_of_their_own_are_listed_and_cleared_one_by_one(lab):
    for layer, bits in ((0, 8), (1, 6)):
        turn(lab, layer=layer)
        turn(lab, key_bits=bits)
    turn(lab, layer=None)
    assert lab.name == "turboquant K4 V4, layer 0 K8 V4, layer 1 K6 V4"
    controls(lab.pages["cache"])["layer 0: K8 V4 \u2715"].click()
    assert lab.wait(120)
    assert lab.layer_bits == {0: (4, 4), 1: (6, 4)}
    controls(lab.pages["cache"])["Same for all"].click()
    assert lab.wait(120)
    assert lab.layer_bits == {0: (4, 4), 1: (4, 4)}
    assert controls(lab.pages["cache"])["Same for all"].disabled


def test_the_number_of_tokens_in_codes_is_shown_and_can_be_all(lab):
    turn(lab, window=64)
    banner = lab.pages["cache"]._banner
    assert "32 of 128 tokens (25%) are in codes" in banner.value  # 62 may be coded, in blocks of 32
    controls(lab.pages["cache"])["Code all tokens"].click()
    assert lab.wait(120)
    assert (lab.sinks, lab.window) == (0, 0)
    assert "All 128 tokens are in codes." in banner.value


def test_saved_output_waits_for_requested_measurements(lab, tmp_path):
    lab.key_bits = 3  # without wait()
    assert "turboquant K3 V4" in repr(lab)
    assert "still measuring" not in repr(lab)
    lab.window = 40  # no test has measured this window
    written = pl.read_parquet(lab.memory.to_parquet(tmp_path / "memory.parquet"))
    assert lab.wait(120)
    assert written.equals(lab.memory.frame)
    lab.window, lab.key_bits = 56, 5
    assert "K5 V4, sinks=2, window=56" in lab.export(tmp_path / "report.html").read_text()


def test_a_chart_that_a_cell_shows_does_not_change(lab):
    turn(lab, key_bits=4)
    shown = lab.bits.still()
    before = shown.frame
    assert before.equals(lab.bits.frame)
    assert lab.bits._repr_mimebundle_()[0]["application/vnd.jupyter.widget-view+json"]["model_id"] != lab.bits.model_id
    turn(lab, key_bits=2)
    assert shown.frame.equals(before)
    assert not shown.frame.equals(lab.bits.frame)


def test_the_sliders_of_a_head_name_the_bits_that_they_set(lab):
    keys = lab.turn_to("keys")
    assert keys._width.description == "K bits (all)"
    turn(keys, tensor="values")
    assert keys._width.description == "V bits (all)"
    turn(keys, tensor="keys")
    turn(lab, page="cache", layer=1)
    turn(lab, key_bits=6)
    errors = lab.turn_to("errors")
    assert errors._width.description == "K bits (layer 1)"
    assert "Values are shown at 6 bits too; in the cache they have 4." in errors._banner.value


def test_state_names_head_and_page(lab):
    turn(lab, head=1, page="keys")
    state = json.loads(json.dumps(lab.state))
    assert (state["head"], state["page"]) == (1, "keys")
    turn(lab, head=0, page="cache")
    lab.restore(state)
    assert lab.wait(120)
    assert lab.state == state


@pytest.mark.parametrize(
    ("name", "step"),
    [("cache", {"key_bits": 3}), ("errors", {"layer": 1}), ("keys", {"layer": 1}), ("tokens", {"token": 70})],
)
def test_rows_that_are_put_into_a_chart_equal_those_of_a_new_chart(lab, name, step, monkeypatch):
    page = lab.turn_to(name)
    before = {chart: view.spec["id"] for chart, view in page.charts.items()}
    monkeypatch.setattr(ChartView, "show", None)  # drawing a new chart takes ten times as long
    lab.selection.choose(**step)
    assert page.wait(120)
    monkeypatch.undo()
    for chart, kind in page._kinds.items():
        view, fresh = page.charts[chart], ChartView(kind.draw(page.shown[chart], page._look()))
        assert view.spec["id"] == before[chart]
        assert (view._bare, view.content["params"]) == (fresh._bare, fresh.content["params"])
        drawn = fresh.frame
        assert sorted(view.frame.select(drawn.columns).rows(), key=repr) == sorted(drawn.rows(), key=repr)
    lab.selection.choose(token=None)


def test_work_moves_only_the_bar_of_the_open_page(lab):
    for name in ("tokens", "errors"):
        lab.turn_to(name)
    bars = {name: next(part for part in parts(lab.pages[name]) if isinstance(part, ProgressBar)) for name in lab.pages}
    moved = dict.fromkeys(bars, 0)

    def count(name):
        moved[name] += 1

    for name, bar in bars.items():
        bar.children[1].observe(lambda _, name=name: count(name), "value")
    lab.worker.submit("test", lambda progress: progress(1, 4, "a step"))
    assert lab.wait(120)
    assert [name for name, times in moved.items() if times] == ["errors"]
    following = [part for part in TABLE.values() if isinstance(part, ProgressBar) and part._worker is lab.worker]
    assert {*following} == {
        part for page in lab.pages.values() for part in parts(page) if isinstance(part, ProgressBar)
    }


def test_a_report_has_the_charts_of_every_page_that_was_made(lab, tmp_path):
    for page in PAGES:
        lab.turn_to(page)
    lab.pages["budget"].start()
    assert lab.wait(120)
    assert {name.split("_")[0] for name in lab.named} >= {"errors", "keys", "budget", "memory"}
    html = lab.export(tmp_path / "report.html").read_text()
    assert html.count('<div class="chart"') == len(lab.named)
    assert "Keys and values" in html
    assert "nothing was timed yet" not in html
    files = lab.save_pictures(tmp_path / "pictures")
    assert len(files) == 3 * len(lab.named)


def test_without_a_kernel_the_open_page_is_saved(lab):
    def picture() -> bytes:
        import base64

        return base64.b64decode(lab._repr_mimebundle_()[0]["image/png"])

    turn(lab, page="cache")
    first = png_size(picture())
    turn(lab, page="keys")
    assert png_size(picture()) != first


def test_a_page_that_fails_shows_a_sentence_and_the_laboratory_still_works(monkeypatch):
    class Silent(Letters):
        def encode(self, text, add_special_tokens=True):
            return super().encode(text)[:300]

    lab = vl.Lab(tiny("llama"), Silent(), tokens=64)
    try:
        lab.wait(60)
        monkeypatch.setitem(KINDS, "keys", ("Keys", lambda _: 1 / 0))
        with pytest.raises(InputError, match="The page 'keys' could not be made: .*division by zero"):
            lab.turn_to("keys")
        assert "ZeroDivisionError" in lab._message.value
        assert lab.turn_to("errors").charts
    finally:
        lab.worker.close()


@pytest.mark.parametrize("page", NAMES)
def test_every_control_is_explained(lab, page):
    """The tooltip is a sentence, with the range of a number between two ends."""
    for words, control in controls(lab.turn_to(page)).items():
        tip = control._trait_values.get("tooltip") or ""
        assert len(tip.split()) > 3, words
        if isinstance(control, ipywidgets.IntSlider | ipywidgets.BoundedIntText):
            assert "to" in tip.split(), words


def test_layers_without_codes_are_listed_with_their_reason_and_their_share():
    coded = LayerFacts(0, "KVCache", True, None, None, 0, 2, 64, 64)
    own = LayerFacts(1, "RotatingKVCache", False, None, 64, 0, 2, 64, 64, reason="it slides")
    decoded = LayerFacts(2, "KVCache", True, None, None, 0, 2, 64, 64, path="arrays", reason="logits are capped")
    assert unusual([coded]) == []
    assert unusual([coded, own, decoded, coded]) == [
        "1 of 4 layers keep the model's own cache, exact (25% of an exact token's bytes, it slides).",
        "1 of 4 layers are decoded to arrays before attention (25% of an exact token's bytes, logits are capped).",
    ]


def test_every_page_names_the_notebook_and_the_heading_that_explain_it(lab):
    for page in NAMES:
        file, heading = lab.turn_to(page).HELP.split("#")
        cells = json.loads((Path(__file__).parents[1] / "notebooks" / file).read_text())["cells"]
        lines = [line.strip() for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"]]
        assert f"## {heading}" in lines, page


def test_numbers_of_older_settings_are_marked_stale_until_new_ones_are_measured(lab):
    release = threading.Event()
    cache, memory = lab.pages["cache"], lab.turn_to("memory")
    lab.page = "cache"
    lab.worker.submit("occupied", lambda _: release.wait(60))
    lab.sinks = 7
    assert [view.note["badge"] for view in (cache.errors, cache.bits, cache.memory)] == ["stale", "measured", "stale"]
    assert "older settings" in cache.errors.note["tip"]
    release.set()
    assert lab.wait(120)
    assert cache.errors.note["badge"] == "measured"
    assert cache.memory.note["badge"] == "measured, then predicted"
    assert memory.chart.note["badge"] == "predicted"
    assert all(view.note["why"] for page in lab.pages.values() for view in page.views)


def test_a_laboratory_of_the_same_model_and_text_finds_earlier_measurements(lab, monkeypatch):
    def measured(*_: object) -> None:
        raise AssertionError("measured again")

    before = lab.errors.frame.sort("tensor", "layer", "head")
    for name in CachePage.MEASURES:
        monkeypatch.setitem(CachePage.MEASURES, name, measured)
    again = vl.Lab(lab.experiment.model, Letters(), tokens=128, sinks=2, window=16)
    assert again.errors.frame["output_error"].to_list() == before["output_error"].to_list()
    again.close()
    changed = tiny("llama", seed=1)
    with pytest.raises(AssertionError, match="measured again"):
        vl.Lab(changed, Letters(), tokens=128, sinks=2, window=16)


def test_points_are_drawn_at_the_bytes_of_a_chosen_context_and_a_click_picks_one(lab):
    page = lab.turn_to("compare")
    lab.measure()
    turn(lab, layer=1)
    turn(lab, key_bits=8)
    lab.measure()
    assert lab.wait(120)
    page.context = 1000
    first, last = page.frontier.frame.sort("point")["held_bytes"].to_list()[-2:]
    settings = {"sinks": 2, "window": 16, "context": 1000}
    planned = vl.measure.plan_memory(lab.experiment.model, "turboquant", bits=4, **settings)
    assert first == planned.filter(pl.col("cache").str.starts_with("turboquant"))["bytes"].sum()
    cache = vl.make_cache(lab.experiment.model, lab.plan)
    for count in calls(1000):
        lab.experiment.model(mx.zeros((1, count), mx.int32), cache=cache)
    assert last == vl.report(cache)["held_bytes"].sum()
    assert "bytes predicted for 1,000 tokens" in json.dumps(page.frontier.to_dict())
    point = len(lab.measured) - 2
    page.frontier.picked_point = point
    assert page._list.value == point
    page._take.click()
    assert lab.selection.choice.own_bits == {}
    assert page._message.value == "<em>All pages now show turboquant K4 V4, sinks=2, window=16.</em>"
