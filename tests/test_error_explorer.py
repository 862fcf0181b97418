"""The explorer of errors: its charts show measurements of the chosen head and method."""

from dataclasses import replace

import polars as pl
import pytest

import veloxlab as vl
from tests.knobs import turn
from veloxlab.errors import InputError
from veloxlab.measure.errors import attention_map, errors_along_position, errors_by_bits
from veloxlab.views import by_bits_caption, picture
from veloxlab.views import errors_by_bits as drawn

ALL = ["attention", "positions", "distribution", "logits", "by_bits"]


@pytest.fixture(scope="module")
def seen(smollm2):
    capture = vl.capture(*smollm2, tokens=96)
    return replace(capture, layers=capture.layers[6:9])


@pytest.fixture(scope="module")
def explorer(seen):
    explorer = vl.widgets.ErrorExplorer(seen, layer=7)
    assert explorer.wait(120)
    yield explorer
    explorer.worker.close()


@pytest.fixture(autouse=True)
def _as_it_was(explorer):
    yield
    turn(explorer, layer=7, head=0, method="turboquant", bits=2)


@pytest.mark.parametrize(
    ("control", "values", "charts"),
    [
        ("layer", (8, 6), ALL),
        ("head", (1, 2), ALL),
        ("method", ("rabitq", "polarquant"), ALL),
        ("bits", (3, 5), ["attention", "positions", "distribution", "logits"]),
    ],
)
def test_every_control_moved_twice_changes_its_charts_twice_and_no_other(explorer, control, values, charts):
    for value in values:
        before = {name: view.frame for name, view in explorer.charts.items()}
        turn(explorer, **{control: value})
        for name, view in explorer.charts.items():
            assert (not view.frame.equals(before[name])) == (name in charts), name
    assert explorer.problem == ""


def test_the_charts_show_the_measurements(explorer, seen):
    turn(explorer, layer=8, head=1, method="rvq", bits=4)
    layer = replace(seen, layers=seen.layers[2:3])
    tokens = vl.measure.token_errors(layer, "rvq", bits=4).filter(head=1)
    along = errors_along_position(tokens, blocks=32)
    assert explorer.charts["positions"].frame.drop("head").equals(along)
    maps = attention_map(layer.layers[0], 3, "rvq", bits=4, blocks=20)  # three query heads for each KV head
    shown = explorer.charts["attention"].frame
    assert shown.select("kind", "query", "key", "weight").equals(maps.select("kind", "query", "key", "weight"))
    assert "rvq at 4 bits, layer 8, KV head 1: " in explorer.charts["attention"].content["params"]["caption"]


def test_the_error_by_bits_is_that_of_the_summed_errors(seen):
    layer = replace(seen, layers=seen.layers[:1])
    widths = (2, 4)
    tokens = pl.concat(vl.measure.token_errors(layer, bits=bits) for bits in widths)
    taken = pl.concat(
        vl.measure.code_bits(layer, bits=bits).with_columns(bits=pl.lit(bits, pl.Int32)) for bits in widths
    )
    frame = errors_by_bits(tokens, taken)
    assert frame["true_bits"].to_list() == [2.25, 4.25] * 2
    keys = tokens.filter(tensor="keys", bits=2)
    expected = keys["squared_error"].cast(pl.Float64).sum() / keys["squared_norm"].cast(pl.Float64).sum()
    assert frame["error"][0] == pytest.approx(expected, rel=1e-12)
    factor = (frame["error"][0] / frame["error"][1]) ** 0.5
    assert f"keys {factor:.1f}×" in by_bits_caption(frame)
    assert "Relative squared error against true bits per value" in picture.svg(drawn(frame).to_dict())
    broken = frame.with_columns(not_finite=pl.lit(3))
    assert by_bits_caption(broken).endswith("× 12 not finite")
    with pytest.raises(InputError, match="no rows to pool"):
        errors_by_bits(tokens.clear(), taken)


def test_impossible_choices_are_refused_at_once(explorer):
    with pytest.raises(InputError, match=r"'commvq' cannot be chosen here: .* needs calibration=vl\.calibrate"):
        explorer.method = "commvq"
    turn(explorer, method="polarquant")
    with pytest.raises(InputError, match="Keys at bits=1 are out of range: PolarQuant takes"):
        explorer.bits = 1
    assert (explorer.bits, explorer.problem) == (2, "")
