"""Work can end within its long steps: between the layers of a model, and between the steps of a fit."""

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from tests.letters import Letters
from tests.test_calibration import TEXT
from tests.tiny_models import tiny
from veloxlab.codecs.base import Sample
from veloxlab.measure.activations import capture_layers
from veloxlab.measure.derivative import loss_gradients
from veloxlab.measure.gradients import AHEAD, Room, with_gradients, write_gradients
from veloxlab.mlxlm.hooks import LONG, attach
from veloxlab.progress import ended_by, may_end, silent
from veloxlab.widgets import Cancelled, Worker

LAYERS = 3
IDS = Letters().encode(TEXT)[: 4 * LONG]


class Ends:
    """Counts the places at which work may end; raises from the one of a number on."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.asked = at, 0

    def __call__(self) -> None:
        self.asked += 1
        if 0 < self.at <= self.asked:
            raise Cancelled


@pytest.fixture(scope="module")
def model():
    attach()
    return tiny("llama", num_hidden_layers=LAYERS)


def test_a_model_over_a_long_text_ends_between_its_layers(model):
    plain = model(mx.array([IDS]))
    for cache in (None, vl.make_cache(model, "rvq", sinks=0, window=0)):
        with ended_by(each := Ends()):
            found = model(mx.array([IDS]), cache=cache)
        assert each.asked == LAYERS
        assert cache is not None or mx.array_equal(found, plain)
        with pytest.raises(Cancelled), ended_by(Ends(2)):
            model(mx.array([IDS]), cache=cache)
    with ended_by(each):
        model(mx.array([IDS[: LONG - 1]]))  # a step of generation is short, and has no such places
    assert each.asked == LAYERS


def test_a_capture_holds_one_layer_at_a_time_all_the_same(model):
    with ended_by(each := Ends()):
        seen = capture_layers(model, IDS)
        next(seen)
    assert each.asked == 0


def test_gradients_end_within_layers_forwards_and_backwards(model):
    plain = loss_gradients(model, IDS)
    with ended_by(each := Ends()):
        found = loss_gradients(model, IDS)
    assert each.asked > 2 * 2 * LAYERS  # more than one step of each layer in each direction
    for own, other in zip(plain, found, strict=True):
        assert all(mx.allclose(a, b, atol=1e-6).item() for a, b in zip(own, other, strict=True))  # float32's rounding
    before = mx.get_active_memory()
    for place in (LAYERS, each.asked - LAYERS):
        with pytest.raises(Cancelled), ended_by(Ends(place)):
            loss_gradients(model, IDS)
    assert mx.get_active_memory() == before  # a step keeps nothing


def test_windows_that_other_threads_read_end_too(model, tmp_path):
    windows = [IDS[:LONG], IDS[LONG : 2 * LONG], IDS[2 * LONG : 3 * LONG]]
    count = Ends()
    with ended_by(count):
        list(with_gradients(model, windows, 2, 0, tmp_path / "a", silent))
    assert count.asked >= 3 * 2 * LAYERS
    with pytest.raises(Cancelled), ended_by(Ends(2 * LAYERS + 1)):  # in the second window, or in the wait for it
        list(with_gradients(model, windows, 2, 0, tmp_path / "b", silent))
    assert len([*(tmp_path / "b").glob("*.safetensors")]) < len(windows)


def test_a_window_waits_for_room_and_gives_it_back_when_it_ends(model, tmp_path):
    room = Room(LAYERS)

    def write():
        return write_gradients(model, IDS, {"seed": 0}, tmp_path / "0.safetensors", room)

    for steps in (1, 4 * LAYERS):
        with pytest.raises(Cancelled), ended_by(Ends(steps)):
            write()
    with ended_by(Ends(60)):  # without room it would end in the wait
        assert write().exists()
    for _ in range(LAYERS + 1 + LAYERS * AHEAD // 100):
        room.take()
    with pytest.raises(Cancelled), ended_by(Ends(1)):
        write()


def test_errors_end_between_layers_and_caches_while_they_are_filled(model):
    seen = vl.capture(model, Letters(), TEXT, tokens=40)
    with ended_by(errors := Ends()):
        vl.measure.token_errors(seen)
    assert errors.asked == 2 * LAYERS  # for keys and for values
    with ended_by(growth := Ends()):
        vl.measure.memory_growth(seen, upto=400, points=2)
    assert growth.asked == 2 * 400 // 40  # for ours and for the exact one


def test_advice_ends_between_caches_and_within_the_fit_of_one(model, tmp_path, monkeypatch):
    with ended_by(each := Ends()):
        vl.advise(model)
    assert each.asked > 10
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("veloxlab.measure.advise.to_measure", lambda rows, _: [rows[-1] | {"method": "spectralquant"}])
    told = []
    vl.advise(model, Letters(), tokens=40, progress=lambda *said: told.append(said[2]))
    assert any("fitting layer 2" in said for said in told)


@pytest.mark.parametrize(("method", "bits"), [("vecinfer", 1), ("commvq", 1)])
def test_a_fit_ends_between_its_steps(method, bits):
    x = mx.array(np.random.default_rng(0).standard_normal((1, 2, 1024, 32)), mx.float32)
    codec = vl.codecs.find_method(method).codec(32, bits, "values")
    with ended_by(each := Ends()):
        codec.fit(Sample(x))
    assert each.asked > 3
    with pytest.raises(Cancelled), ended_by(Ends(2)):
        codec.fit(Sample(x))


def test_a_cancelled_job_ends_within_a_step():
    worker, ended = Worker("ending"), []

    def job(_: object) -> None:
        worker.cancel()
        may_end()
        ended.append("the step")

    worker.submit("key", job)
    assert worker.wait(60)
    worker.close()
    assert ended == []
    may_end()  # outside of any work
