"""Layers that can have fewer bits: each alone, then as many as a limit allows, on a model of random weights."""

import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.measure.narrow import NARROW, narrow_layers
from veloxlab.measure.quality import fidelity_to, reference


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def exact(model):
    return reference(model, Letters(), tokens=48)


@pytest.fixture(scope="module")
def plan(model):
    return vl.Plan.uniform(model, bits=6, sinks=0, window=0)


def lost(exact, plan, layers) -> float:
    for layer in layers:
        plan = plan.with_layer(layer, key_bits=2, value_bits=2)
    return fidelity_to(exact, plan)["kl_mean"][0]


def test_as_many_layers_as_the_limit_allows_are_measured_together(exact, plan):
    every, none = lost(exact, plan, range(4)), lost(exact, plan, [])
    limit = (every + none) / 2
    told = []
    found = narrow_layers(exact, plan, limit=limit, progress=lambda done, most, said: told.append((done, most)))
    assert found.frame.schema == NARROW
    assert found.frame["kl_mean"].is_sorted()
    assert 0 < len(found.layers) < 4
    assert found.before == none
    assert found.together == lost(exact, plan, found.layers) <= limit
    one_more = found.frame["layer"][: len(found.layers) + 1]
    assert lost(exact, plan, one_more) > limit
    assert [done for done, _ in told] == list(range(len(told)))
    assert len(told) <= told[-1][1]
    assert f"{len(found.layers)} of 4 layers may go to 2 bits" in str(found)


def test_a_limit_that_allows_all_or_no_layers_is_reported(exact, plan):
    assert narrow_layers(exact, plan, limit=100.0).layers == [0, 1, 2, 3]
    nothing = narrow_layers(exact, plan, limit=0.0, layers=[1, 3])
    assert (nothing.layers, nothing.frame["layer"].sort().to_list()) == ([], [1, 3])
    assert str(nothing).startswith("No layer may go to 2 bits within 0.0 nats: ")


def test_no_layers_and_missing_layers_are_refused(exact, plan):
    with pytest.raises(InputError, match="There are no layers to try"):
        narrow_layers(exact, plan, layers=[])
    with pytest.raises(InputError, match="no layer 9"):
        narrow_layers(exact, plan, layers=[9])
