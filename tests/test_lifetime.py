"""Widgets end: by closing, by garbage collection, and when their cell is run again. A small model, random weights."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import altair as alt
import ipywidgets
import polars as pl
import pytest
from jupyter_client.manager import start_new_kernel

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.widgets import ChartView, VegaRuntime, lifetime, link
from veloxlab.widgets.explore import Explore

PATIENCE = 120  # seconds
FRAME = pl.DataFrame({"layer": [0, 1], "error": [1.0, 2.0]})


def bars(frame: pl.DataFrame) -> alt.Chart:
    return alt.Chart(frame, width=100).mark_bar().encode(x="layer:O", y="error:Q")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Return a user's cache folder for all tests here: one bundle of Vega, one calibration."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def before(monkeypatch, cache) -> Callable[[], dict[str, int]]:
    """Return a function that counts widgets, threads and captures made since the test began."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    VegaRuntime.shared()
    gc.collect()
    widgets, threads = {*lifetime.TABLE}, running()

    def count() -> dict[str, int]:
        deadline = time.monotonic() + 10
        while running() - threads and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread first ends its last step
        gc.collect()
        return {"widgets": len({*lifetime.TABLE} - widgets), "threads": len(running() - threads)}

    return count


def running():
    """Return threads, except those of the process that share the work of kernels."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("veloxlab-kernels")}


NOTHING = {"widgets": 0, "threads": 0}


def lab_of(model: Any) -> vl.Lab:
    """Return a laboratory with every page open and a measured point."""
    lab = vl.Lab(model, Letters(), tokens=64, sinks=2, window=16)
    lab.measure()
    for page in ("generation", "budget", "memory", "keys", "errors"):
        lab.turn_to(page)
    lab.pages["budget"].start()
    assert lab.wait(PATIENCE)
    assert lab.pages["budget"].named
    assert lab.frontier is not None
    lab.worker.cancel()  # jobs ahead
    return lab


def side_by_side(model: Any) -> vl.widgets.SideBySide:
    widget = vl.widgets.SideBySide(model, Letters(), tokens=2)
    widget.run()
    return widget


def tuner_of(model: Any) -> vl.widgets.BudgetTuner:
    return vl.widgets.BudgetTuner(model, Letters(), rate_settings={"sequences": 1, "tokens": 64})


MAKERS: dict[str, Callable[[Any], Any]] = {
    "Lab": lab_of,
    "CacheExplorer": lambda model: vl.widgets.CacheExplorer(model, Letters(), tokens=64),
    "KeyExplorer": lambda model: vl.widgets.KeyExplorer(vl.capture(model, Letters(), tokens=64)),
    "ErrorExplorer": lambda model: vl.widgets.ErrorExplorer(vl.capture(model, Letters(), tokens=64)),
    "MemoryPlanner": vl.widgets.MemoryPlanner,
    "SideBySide": side_by_side,
    "BudgetTuner": tuner_of,
    "ChartView": lambda _: ChartView(bars(FRAME)),
    "Explore": lambda _: Explore({1: FRAME, 2: FRAME}, bars, description="bits"),
}


def made(name: str, model: Any) -> Any:
    widget = MAKERS[name](model)
    assert not hasattr(widget, "wait") or widget.wait(PATIENCE, ahead=True)
    return widget


def captures(widget: Any) -> list[weakref.ref[Any]]:
    """Return references to the captures of any panel."""
    held = getattr(getattr(widget, "experiment", widget), "capture", None)
    return [] if held is None else [weakref.ref(held)]


@pytest.mark.parametrize("name", MAKERS)
def test_close_ends_all_widgets_the_thread_and_the_capture(name, model, before):
    widget = made(name, model)
    seen = captures(widget)
    assert len(lifetime.parts(widget)) > 1
    widget.close()
    assert before() == NOTHING
    assert [each() for each in seen] == [None] * len(seen)  # although the closed widget still has a reference
    assert widget.comm is None
    widget.close()


@pytest.mark.parametrize("name", MAKERS)
def test_garbage_collection_ends_all_of_it(name, model, before):
    seen = captures(made(name, model))
    gc.collect()
    assert before() == NOTHING
    assert [each() for each in seen] == [None] * len(seen)


def test_a_failed_widget_leaves_nothing(model, before):
    seen = vl.capture(model, Letters(), tokens=64)
    for failing in (
        lambda: vl.widgets.KeyExplorer(seen, layer=99),
        lambda: vl.widgets.KeyExplorer(seen, method="rvq", bits=3),
        lambda: vl.widgets.MemoryPlanner(method="turbo"),
        lambda: vl.Lab(model, Letters(), bits=77),
    ):
        with pytest.raises(InputError):
            failing()
    assert before() == NOTHING


def test_a_closed_panel_returns_its_tables_and_refuses_all_else_in_a_sentence(model):
    explorer = made("CacheExplorer", model)
    explorer.measure()
    assert explorer.wait(PATIENCE)
    explorer.close()
    assert explorer.measured["name"].to_list() == ["turboquant K4 V4"]
    assert isinstance(explorer, vl.widgets.CacheExplorer)
    assert repr(explorer) == "CacheExplorer(closed)"
    assert explorer._repr_mimebundle_ is None
    for use in (lambda: explorer.plan, lambda: setattr(explorer, "key_bits", 2), lambda: explorer.errors):
        with pytest.raises(InputError, match="This CacheExplorer is closed: make a new one"):
            use()
    assert not hasattr(explorer, "_repr_html_")


def test_a_closed_page_is_made_again_and_the_worker_continues(model):
    lab = vl.Lab(model, Letters(), tokens=64)
    first = lab.turn_to("memory")
    lab.page = "cache"
    first.close()
    assert "memory" not in lab.pages
    assert lab.turn_to("memory") is not first
    lab.close()


def test_a_link_ends_with_either_chart_and_the_other_chart_stays(before):
    one, other = ChartView(bars(FRAME)), ChartView(bars(FRAME))
    link(one, other)
    assert before()["widgets"] == 5  # two charts, two layouts, one link
    one.close()
    assert before()["widgets"] == 2
    assert other.comm is not None
    other.close()
    assert before() == NOTHING


def test_references_to_other_widgets_are_those_of_ipywidgets(before):
    name = ipywidgets.IntSlider().model_id
    assert before()["widgets"] == 3  # with layout and style
    assert name in lifetime.TABLE
    for widget in [lifetime.TABLE[name].layout, lifetime.TABLE[name].style, lifetime.TABLE[name]]:
        widget.close()
    assert name not in lifetime.TABLE
    assert before() == NOTHING


def test_a_message_of_the_page_reaches_a_widget_with_a_weak_reference():
    explore = Explore({1: FRAME, 2: FRAME}, bars, description="bits")
    content = {"data": {"method": "update", "state": {"index": 1}, "buffer_paths": []}}
    explore.slider.comm.handle_msg({"content": content, "buffers": []})
    assert explore.slider.value == 2


class Shell:
    """The information of a kernel about the running cell."""

    def __init__(self) -> None:
        self.user_ns: dict[str, Any] = {}
        self.runs = 0
        self.at_end: list[Callable[[object], None]] = []
        self.events = SimpleNamespace(
            register=lambda _, action: self.at_end.append(action),
            unregister=lambda _, action: self.at_end.remove(action),
        )

    def get_parent(self) -> dict[str, Any]:
        return self.parent

    def run(self, cell: str | None, *shown: Any) -> None:
        self.runs += 1
        self.parent = {"header": {"msg_id": str(self.runs)}, "metadata": {"cellId": cell} if cell else {}}
        for widget in shown:
            widget._repr_mimebundle_()
        for action in [*self.at_end]:
            action(None)


@pytest.fixture
def shell(monkeypatch) -> Shell:
    shell = Shell()
    monkeypatch.setattr(lifetime, "get_ipython", lambda: shell)
    monkeypatch.setattr(lifetime, "_cells", {})
    return shell


def is_open(*widgets: Any) -> list[bool]:
    return [widget.comm is not None for widget in widgets]


def charts(count: int) -> list[ChartView]:
    return [ChartView(bars(FRAME)) for _ in range(count)]


def test_a_cell_that_runs_again_closes_its_earlier_widgets(shell):
    first, second, third, elsewhere = charts(4)
    shell.run("a", first, second)
    shell.run("b", elsewhere)
    assert all(is_open(first, second, elsewhere))
    shell.run("a", third, second)
    assert is_open(first, second, third, elsewhere) == [False, True, True, True]


def test_a_widget_in_a_variable_or_a_box_stays_open(shell):
    named, listed, boxed, alone, new = charts(5)
    shell.user_ns = {"view": named, "views": [listed], "_": alone, "Out": {1: alone}}
    box = ipywidgets.VBox([boxed])
    shell.run("a", named, listed, boxed, alone)
    shell.run("a", new)
    assert is_open(named, listed, boxed, alone) == [True, True, True, False]
    shell.user_ns.clear()
    box.close()
    name = named.model_id
    del named
    gc.collect()
    assert name not in lifetime.TABLE  # it is not displayed any more


def test_a_displayed_widget_stays_open_without_other_references(shell, before):
    shell.run("a", *charts(1))
    shell.run(None, *charts(1))  # from the callback of a button
    assert before()["widgets"] == 4
    shell.run("a", *charts(1))
    assert before()["widgets"] == 4
    for widget in lifetime.TABLE.values():
        if isinstance(widget, ChartView):
            widget.close()
    assert before() == NOTHING


CELL = """
lab = vl.Lab(model, Letters(), tokens=32, sinks=2, window=16)
lab
"""
COUNT = """
import gc, threading, weakref
gc.collect()
print(sum(isinstance(each, vl.measure.Capture) for each in gc.get_objects()), sum(isinstance(each, vl.Lab) for each in
lifetime.TABLE.values()), sum(thread.name == "veloxlab-lab" for thread in threading.enumerate()), len(lifetime.TABLE))
"""


def test_running_the_cell_of_a_lab_again_keeps_one_capture_in_a_real_kernel():
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        counts = []
        run(
            client,
            "import veloxlab as vl\nfrom tests.letters import Letters\nfrom veloxlab.widgets import lifetime",
        )
        run(client, "from tests.tiny_models import tiny\nmodel = tiny('llama')")
        for _ in range(3):
            assert "Lab(turboquant K4 V4" in run(client, CELL, cell="the lab")
            run(client, "lab.worker.cancel(); lab.wait(ahead=True)")
            counts.append(run(client, COUNT))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    captures, labs, threads, events = zip(*map(str.split, counts), strict=True)
    assert captures == labs == ("1",) * 3
    assert set(threads) <= {"0", "1"}  # it starts with the first job, and results are found again
    assert len(set(events)) == 1


def run(client: Any, code: str, cell: str = "another") -> str:
    """Run a cell as JupyterLab does, and return its text output."""
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = client.session.msg("execute_request", content, metadata={"cellId": cell})
    client.shell_channel.send(message)
    said = ""
    while True:
        news = client.get_iopub_msg(timeout=PATIENCE)
        if news["parent_header"].get("msg_id") != message["header"]["msg_id"]:
            continue
        assert news["msg_type"] != "error", news["content"]["traceback"]
        if news["msg_type"] == "execute_result":
            said += news["content"]["data"]["text/plain"]
        elif news["msg_type"] == "stream":
            said += news["content"]["text"]
        elif news["msg_type"] == "status" and news["content"]["execution_state"] == "idle":
            return said
