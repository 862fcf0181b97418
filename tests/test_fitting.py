"""Calibrations that are made when a method is chosen, width by width, and joined."""

import mlx.core as mx
import pytest

import veloxlab as vl
from tests.test_calibration import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.widgets.fitting import Fitting


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def calibrate(model, **settings):
    return vl.calibrate(model, Letters(), "spectralquant", **settings)


def test_widths_fitted_apart_are_those_fitted_together(model):
    joined = calibrate(model, bits=2).joined(calibrate(model, bits=4))
    together = calibrate(model, bits=(2, 4))
    assert joined.widths == together.widths == [2, 4]
    assert joined.identity == together.identity
    x = mx.random.normal((1, 2, 20, 64), key=mx.random.key(0))
    for at, codec in together.codecs.items():
        other = joined.codecs[at]
        assert mx.array_equal(codec.decode(codec.encode(x)), other.decode(other.encode(x)))


@pytest.mark.parametrize(
    ("other", "what"), [({"seed": 1}, "seed"), ({"tokens": 512}, "text, tokens"), ({"basis": "query"}, "options")]
)
def test_calibrations_that_differ_in_more_are_not_joined(model, other, what):
    with pytest.raises(InputError, match=f"These calibrations differ in {what} and not in widths alone"):
        calibrate(model, bits=2).joined(calibrate(model, bits=4, **other))


def test_a_method_is_fitted_once_for_each_width_and_told_of(model):
    fitting, told = Fitting(model, Letters()), []
    assert not fitting.is_ready("spectralquant", 2)
    found = fitting.calibration("spectralquant", [2], lambda *step: told.append(step))
    assert (found.widths, bool(told)) == ([2], True)
    assert fitting.is_ready("spectralquant", 2)
    assert not fitting.is_ready("spectralquant", 3)
    assert fitting.calibration("spectralquant", [2], lambda *_: pytest.fail("it was fitted again")) is found
    assert fitting.calibration("spectralquant", [3]).widths == [2, 3]


def test_what_needs_no_fitting_gets_none_and_what_was_given_is_taken(model):
    given = calibrate(model, bits=(2, 4))
    fitting = Fitting(model, Letters(), given)
    assert fitting.calibration("turboquant", [2]) is None
    assert fitting.calibration("spectralquant", [2, 3]) is given
    assert fitting.widths("spectralquant") == [2, 4]
    assert fitting.widths("turboquant")[:3] == [1, 2, 3]


def test_without_a_model_only_what_can_be_had_is_offered(model):
    assert "commvq" not in Fitting().methods
    assert {"turboquant", "rabitq"} <= {*Fitting().methods}
    assert "spectralquant" in Fitting(given=calibrate(model, bits=2)).methods
    assert "none" not in Fitting(model, Letters()).methods
    with pytest.raises(InputError, match="commvq has to be fitted first"):
        Fitting().calibration("commvq", [2])
