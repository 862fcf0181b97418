"""The memory planner shows predictions for its controls, from any thread."""

import re
import threading
from typing import Any

import ipywidgets
import polars as pl
import pytest

import veloxlab as vl
from tests.test_runs import run
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.known import UNKNOWN, expected_loss, known_losses
from veloxlab.widgets.runs import Runs

LLAMA_8B = {"layers": 32, "kv_heads": 8, "head_dim": 128}


@pytest.fixture
def planner():
    planner = vl.widgets.MemoryPlanner(**LLAMA_8B, memory_gb=8.0)
    yield planner
    planner.worker.close()


def turn(planner, **knobs):
    """Set controls as JupyterLab does, from a thread that is not the main one."""

    def work():
        for name, value in knobs.items():
            setattr(planner, name, value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert planner.wait(60)
    assert planner._message.value == ""


def drawn(planner) -> int:
    """Return the bytes of the first cache in the chart."""
    frame = planner.chart.frame.filter(pl.col("part").is_not_null())
    return frame.filter(pl.col("cache") == frame["cache"][0])["bytes"].sum()


def expected(**settings) -> int:
    frame = vl.measure.plan_memory(vl.models.ModelShape.typed(**LLAMA_8B), **settings)
    return frame.filter(pl.col("cache") == frame["cache"][0])["bytes"].sum()


def test_every_knob_moves_the_chart_twice(planner):
    assert drawn(planner) == expected(context=32_768)
    settings: dict[str, Any] = {"context": 32_768}
    for name, values in {
        "context": (65_536, 4096),
        "batch": (3, 2),
        "key_bits": (2, 5),
        "value_bits": (3, 6),
        "sinks": (0, 8),
        "window": (0, 128),
    }.items():
        for value in values:
            settings[name] = value
            turn(planner, **{name: value})
            assert drawn(planner) == expected(**settings), (name, value)


def test_every_method_is_planned_with_widths_of_its_own(planner):
    for method in vl.methods()["id"]:
        turn(planner, method=method)
        bits = {"key_bits": planner.key_bits, "value_bits": planner.value_bits}
        assert drawn(planner) == expected(context=32_768, method=method, **bits)
        assert method in planner._code.value
    turn(planner, method="rvq")
    assert planner.key_bits in (2, 4, 6, 8)


def test_another_model_is_planned_with_room_for_its_weights(planner):
    turn(planner, model="8B, as Llama 3.1")
    assert drawn(planner) == expected(context=32_768)
    assert planner._typed.layout.display == "none"
    assert "trained for 131,072" in str(planner.chart.to_dict())
    turn(planner, machine_gb=16.0, weight_bits=4)
    planner.leave_room()
    # a quarter of 16 GB is the system's, and a weight takes 4.5 bits with its scale and bias
    assert planner.memory_gb == pytest.approx(12 - 8.030261248 * 4.5 / 8, abs=1e-3)
    assert planner._message.value == "<em>16 GB: 4 for the system, 4.52 for the weights, 7.48 for the cache.</em>"
    planner.say("")
    turn(planner, model="70B, as Llama 3.1")
    planner.leave_room()
    assert "none for the cache: use fewer weight bits" in planner._message.value
    assert planner.memory_gb == pytest.approx(7.483, abs=1e-3)
    planner.model = "no-such-folder"
    assert planner.wait(60)
    assert "There is no file or folder no-such-folder" in planner._message.value
    planner.model = "typed in"
    assert planner.wait(60)
    planner.leave_room()
    assert "The weights of a model that is typed in are not known" in planner._message.value


def cells(planner, cache):
    """Return the table's row of a cache: bytes, tokens, loss, flips, kind and source."""
    row = next(row for row in re.findall(r"<tr>(.*?)</tr>", planner._losses.value) if f">{cache}<" in row)
    return re.findall(r">([^<]*)</td>", row)[1:]


def test_each_cache_has_its_loss_and_the_source_of_it(planner):
    turn(planner, model="8B, as Llama 3.1", key_bits=4)
    known = known_losses()
    assert cells(planner, "fp16")[2:5] == ["0", "0%", "exact"]
    lost = f"{known['turboquant 4 bit']['kl_mean']:.2g}"
    assert cells(planner, "turboquant K4 V4")[2:] == [
        lost,
        f"{known['turboquant 4 bit']['top1_flips']:.0%}",
        "predicted",
        "SmolLM2-135M at 4 bits, 4 sinks, no window",
    ]
    assert cells(planner, "mlx-lm 8 bit")[2] == f"{known['mlx-lm 8 bit']['kl_mean']:.2g}"
    turn(planner, key_bits=3)
    more = f"{known['turboquant 3 bit']['kl_mean']:.2g}"
    assert cells(planner, "turboquant K3 V4")[2] == f"{lost} to {more}"
    turn(planner, key_bits=8, value_bits=8)
    assert cells(planner, "turboquant K8 V8")[2] == f"less than {lost}"
    assert expected_loss("vecinfer", 0.5, 4) is UNKNOWN


def test_a_measurement_on_this_model_replaces_a_prediction():
    runs = Runs()
    planner = vl.widgets.MemoryPlanner(tiny("llama"), runs=runs)
    assert cells(planner, "turboquant K4 V4")[4] == "predicted"
    runs.add(run(key_bits=4, value_bits=4, sinks=0))
    assert cells(planner, "turboquant K4 V4")[4] == "predicted"  # other exact tokens
    runs.add(run(key_bits=4, value_bits=4))
    assert cells(planner, "turboquant K4 V4")[2:] == ["0.5", "25%", "measured", "this model: t"]
    planner.model = "8B, as Llama 3.1"
    assert planner.wait(60)
    assert cells(planner, "turboquant K4 V4")[4] == "predicted"
    planner.close()


def test_a_typed_shape_is_planned(planner):
    before = drawn(planner)
    turn(planner, layers=64)
    assert drawn(planner) == pytest.approx(2 * before, rel=1e-4)  # except for the tables
    turn(planner, sliding_window=1024, full_every=4)
    assert drawn(planner) < before
    assert planner.chart.frame["cache"].unique().sort().to_list() == ["fp16", "turboquant K4 V4"]


def test_each_context_that_is_accepted_is_planned_and_shown_by_the_slider(planner):
    (slider,) = (
        each for each in planner.children[1].children[0].children if isinstance(each, ipywidgets.FloatLogSlider)
    )
    for given, tokens in (("32k", 32_768), (1, 1), (100, 100), (2**24, 2**24)):
        turn(planner, context=given)
        assert planner.context == slider.value == tokens
        assert drawn(planner) == expected(context=given)


def test_more_memory_is_a_larger_context(planner):
    first = planner.largest["tokens"][0]
    turn(planner, memory_gb=16.0)
    assert planner.largest["tokens"][0] > 1.9 * first
    contexts = planner.chart.frame.filter(pl.col("context").is_not_null())
    assert contexts["context"].to_list() == planner.largest["tokens"].to_list()


def test_a_loaded_model_is_planned():
    model = tiny("gemma3_text")
    planner = vl.widgets.MemoryPlanner(model, context=4096, method="rabitq", window=16)
    assert planner.plan.equals(vl.measure.plan_memory(model, "rabitq", context=4096, window=16))
    bundle, _ = planner._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBOR")
    assert bundle["text/plain"].startswith("MemoryPlanner(gemma3_text: 4,096 tokens as rabitq K4 V4: ")


def test_an_impossible_shape_is_reported_and_the_chart_stays(planner):
    before = drawn(planner)
    planner.full_every = 6
    assert planner.wait(60)
    assert "full_every=6 has no meaning without sliding_window" in planner._message.value
    assert drawn(planner) == before
    turn(planner, full_every=0)


@pytest.mark.parametrize(
    ("knob", "value", "sentence"),
    [
        ("context", 0, "context=0 cannot be used: give a whole number from 1 to 16777216"),
        ("context", 2**24 + 1, "context=16777217 cannot be used: give a whole number from 1 to 16777216"),
        ("window", -1, "window=-1 cannot be used: give a whole number, 0 or more"),
        ("memory_gb", 0.0, "memory_gb=0.0 cannot be used: give a finite number above 0"),
        ("method", "turbo", "Unknown method 'turbo'"),
    ],
)
def test_impossible_knobs_are_refused_and_nothing_changes(planner, knob, value, sentence):
    before = planner.plan
    with pytest.raises(InputError, match=sentence):
        setattr(planner, knob, value)
    with pytest.raises(InputError, match=sentence):
        vl.widgets.MemoryPlanner(**{knob: value})
    assert planner.plan.equals(before)


def test_bits_that_a_method_does_not_have_and_unknown_knobs_are_refused_at_once():
    with pytest.raises(InputError, match="Keys at bits=3 are out of range"):
        vl.widgets.MemoryPlanner(method="rvq", key_bits=3)
    with pytest.raises(InputError, match="MemoryPlanner has no setting 'colour'"):
        vl.widgets.MemoryPlanner(colour="red")
