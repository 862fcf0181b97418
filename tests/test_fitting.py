"""Calibrations that are computed when a method is chosen, width by width, and joined."""

from dataclasses import replace

import mlx.core as mx
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.codecs import METHODS
from veloxlab.codecs.saving import to_parts
from veloxlab.errors import InputError
from veloxlab.widgets.selection import Fitting


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def calibrate(model, **settings):
    return vl.calibrate(model, Letters(), "spectralquant", **settings)


def test_widths_fitted_separately_equal_those_fitted_together(model):
    joined = calibrate(model, bits=2).joined(calibrate(model, bits=4))
    together = calibrate(model, bits=(2, 4))
    assert joined.widths == together.widths == [2, 4]
    assert joined.identity == together.identity
    x = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
    for at, codec in together.codecs.items():
        other = joined.codecs[at]
        assert mx.array_equal(codec.decode(codec.encode(x)), other.decode(other.encode(x)))


CALIBRATED = [(name, {}) for name, method in METHODS.items() if method.calibrated] + [
    ("turboquant", {"outliers": 16}),
    ("vecinfer", {"smooth": False}),
    ("polarquant", {"codebook": "fitted"}),
    ("rabitq", {"centroid": True}),
]


@pytest.mark.parametrize(("method", "options"), CALIBRATED, ids=str)
def test_more_widths_do_not_make_another_calibration(model, method, options):
    """The fit at one width is the same to the bit, for any other widths beside it."""
    first = 1 if method == "vecinfer" else 2  # 3 bits need a longer text
    given = {"tokens": 300, **options}
    one, more = (vl.calibrate(model, Letters(), method, TEXT, bits=b, **given) for b in (first, (first, first + 1)))
    assert one.identity == more.identity
    for at, codec in one.codecs.items():
        (plain, arrays), (more_plain, more_arrays) = to_parts(codec), to_parts(more.codecs[at])
        assert plain == more_plain
        assert arrays.keys() == more_arrays.keys()
        assert all(mx.array_equal(arrays[name], more_arrays[name]) for name in arrays)


def test_a_plan_takes_a_calibration_of_more_widths_and_no_other(model):
    one, more, other = (calibrate(model, **settings) for settings in ({"bits": 2}, {"bits": (2, 3)}, {"seed": 1}))
    plan = vl.Plan.uniform(model, "spectralquant", bits=2)
    plan = replace(plan, calibrations={"spectralquant": one.identity})
    assert vl.make_cache(model, plan, calibration=more)[0].key_codec is more.codecs[0, "keys", 2]
    with pytest.raises(InputError, match=f"made with the calibration {one.identity} of spectralquant"):
        vl.make_cache(model, plan, calibration=other)
    wider = replace(vl.Plan.uniform(model, "spectralquant", bits=3), calibrations={"spectralquant": one.identity})
    with pytest.raises(InputError, match="holds no keys of layer 0 at 3 bits"):
        vl.make_cache(model, wider, calibration=one)


@pytest.mark.parametrize(
    ("other", "what"), [({"seed": 1}, "seed"), ({"tokens": 512}, "text, tokens"), ({"basis": "query"}, "options")]
)
def test_calibrations_that_differ_in_more_are_not_joined(model, other, what):
    with pytest.raises(InputError, match=f"These calibrations differ in {what} and not in widths alone"):
        calibrate(model, bits=2).joined(calibrate(model, bits=4, **other))


def test_a_method_is_fitted_once_for_each_width_and_reported(model):
    fitting, told = Fitting(model, Letters()), []
    assert not fitting.is_ready("spectralquant", 2)
    found = fitting.calibration("spectralquant", [2], lambda *step: told.append(step))
    assert (found.widths, bool(told)) == ([2], True)
    assert fitting.is_ready("spectralquant", 2)
    assert not fitting.is_ready("spectralquant", 3)
    assert fitting.calibration("spectralquant", [2], lambda *_: pytest.fail("it was fitted again")) is found
    assert fitting.calibration("spectralquant", [3]).widths == [2, 3]


def test_a_method_without_a_fit_gets_none_and_a_given_calibration_is_used(model):
    given = calibrate(model, bits=(2, 4))
    fitting = Fitting(model, Letters(), given)
    assert fitting.calibration("turboquant", [2]) is None
    assert fitting.calibration("spectralquant", [2, 3]) is given
    assert fitting.widths("spectralquant") == [2, 4]
    assert fitting.widths("turboquant")[:3] == [1, 2, 3]


def test_without_a_model_only_available_methods_are_offered(model):
    assert "commvq" not in Fitting().methods
    assert {"turboquant", "rabitq"} <= {*Fitting().methods}
    assert "spectralquant" in Fitting(given=calibrate(model, bits=2)).methods
    assert "none" not in Fitting(model, Letters()).methods
    with pytest.raises(InputError, match="commvq has to be fitted first"):
        Fitting().calibration("commvq", [2])
