"""Requirements of VS Code, Colab and marimo on widgets, by their documented contracts, checked without them.

VS Code reads a widget's module from ``share/jupyter/nbextensions`` beside the kernel before it tries a CDN, and draws
in a web view without JupyterLab. Colab draws every output in its own frame, with a widget manager that must be
enabled, and gets the module of anywidget from a CDN. A Jupyter server drops messages above a rate.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import altair as alt
import anywidget
import polars as pl
import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection as Server

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.widgets.chart_view import ChartView, VegaRuntime
from veloxlab.widgets.lab import NAMES
from veloxlab.widgets.lifetime import parts

MOVES = 15  # a second, while a key is held: a page draws no more
MODULES = {"anywidget", "@jupyter-widgets/base", "@jupyter-widgets/controls"}
FETCHES = re.compile(r"""\b(?:from|import)\s*\(?\s*["'`]|\b(?:fetch|XMLHttpRequest|importScripts|WebSocket)\b""")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        lab = vl.Lab(tiny("llama"), Letters(), tokens=128, sinks=2, window=16)
        for name in NAMES:
            lab.turn_to(name)
        yield lab
        lab.worker.close()


def modules() -> list[type[anywidget.AnyWidget]]:
    """Return every class of ours with a script."""
    waiting, found = [anywidget.AnyWidget], []
    while waiting:
        kinds = [kind for kind in waiting.pop().__subclasses__() if kind.__module__.startswith("veloxlab")]
        waiting, found = waiting + kinds, found + kinds
    return found


def test_no_widget_needs_a_module_beyond_anywidget(lab):
    assert {part._model_module for part in parts(lab)} <= MODULES
    assert {part._view_module for part in parts(lab)} <= {*MODULES, None, ""}
    local = Path(sys.prefix) / "share" / "jupyter" / "nbextensions" / "anywidget" / "index.js"
    assert local.is_file(), "VS Code finds anywidget's script there, with no CDN"


@pytest.mark.parametrize("kind", modules(), ids=lambda kind: kind.__name__)
def test_a_script_is_self_contained_and_independent_of_jupyterlab(kind):
    script, style = str(kind._esm), str(getattr(kind, "_css", ""))
    assert FETCHES.findall(script.replace("import(/* @vite-ignore */ url)", "")) == []  # the import of a blob
    assert "jupyterapp" not in script
    assert ".jp-" not in script
    assert "@import" not in style
    assert "url(" not in style


def test_the_chart_library_is_sent_once_in_a_message_without_a_rate_limit(lab):
    charts = [part for part in parts(lab) if isinstance(part, ChartView)]
    runtime = VegaRuntime.shared()
    assert {chart.runtime for chart in charts} == {runtime}
    assert "code" in runtime.get_state()  # with `comm_open`, which has no rate limit
    assert len(runtime.code) < Server.iopub_data_rate_limit.default_value  # and alone, if it is requested again
    assert FETCHES.findall(re.sub(r"//.*|/\*.*?\*/", "", str(VegaRuntime._esm))) == []


@pytest.mark.parametrize("name", ["cache", "errors", "keys", "tokens"])
def test_a_held_key_sends_less_than_the_server_s_limit(lab, name):
    page, sent = lab.turn_to(name), Counter()
    for view in page.charts.values():
        view.observe(lambda change: sent.update(bytes=sum(map(len, change["new"]["datasets"].values()))), "content")
    other = {"layer": 1 - lab.selection.choice.shown_layer}
    lab.selection.choose(**{"cache": {"key_bits": 3}, "tokens": {"token": 70}}.get(name, other))
    assert lab.wait(120)
    assert 0 < MOVES * sent["bytes"] < Server.iopub_data_rate_limit.default_value


def test_colab_loads_widgets_once_a_chart_is_made(monkeypatch):
    asked = []
    installed = SimpleNamespace(_installed_url="https://manager")
    colab = SimpleNamespace(enable_custom_widget_manager=lambda: asked.append(1), _widgets=installed)
    monkeypatch.setitem(sys.modules, "google.colab.output", colab)
    anywidget._util.enable_custom_widget_manager_once.cache_clear()
    chart = ChartView(alt.Chart(pl.DataFrame({"x": [1]})).mark_bar().encode(x="x:Q"))
    assert asked == [1]
    metadata = chart._repr_mimebundle_()[1]
    assert metadata["application/vnd.jupyter.widget-view+json"]["colab"]["custom_widget_manager"]["url"]
