"""The tuner shows results of tables for its controls, from any thread, and measures on request."""

import base64
import html
import json
import threading
from dataclasses import replace
from typing import Any

import pytest

import veloxlab as vl
from tests.knobs import controls
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.allocate import ratequant
from veloxlab.allocate.budget import Setting
from veloxlab.allocate.ratequant import EVALUATED
from veloxlab.codecs import METHODS
from veloxlab.codecs.fisherquant import FisherQuant
from veloxlab.errors import InputError
from veloxlab.runtime import Device
from veloxlab.views.picture import png_size
from veloxlab.widgets import ProgressBar, lifetime
from veloxlab.widgets.pages import budget_controls

MEASURED: dict[str, Any] = {"sequences": 2, "tokens": 64, "sinks": 2, "window": 8}
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rates")


@pytest.fixture(scope="module")
def rates(model, folder):
    return vl.rate_budget(model, Letters(), text=TEXT, folder=folder, **MEASURED)


@pytest.fixture
def tuner(rates, model):
    tuner = vl.widgets.BudgetTuner(rates, model, Letters(), budget=3.25, text=TEXT, tokens=48)
    yield tuner
    tuner.worker.close()


@pytest.fixture(scope="module")
def fitted(model, folder):
    return vl.calibrate(model, Letters(), "fisherquant", TEXT, tokens=256, folder=folder)


@pytest.fixture(params=["ratequant", "fisherquant"])
def tuner_of(request, rates, fitted, model):
    """Return a tuner of either method."""
    bounds = vl.allocate.Bounds(methods=(request.param,))
    known = rates.with_calibration(fitted) if request.param == "fisherquant" else rates
    given: dict[str, Any] = {"budget": 3.25, "text": TEXT, "tokens": 48, "calibration": fitted}
    tuner = vl.widgets.BudgetTuner(known, model, Letters(), bounds=bounds, **given)
    yield tuner, "allocated" if request.param == "ratequant" else request.param
    tuner.worker.close()


def turn(work) -> None:
    """Set controls as JupyterLab does, from a thread that is not the main one."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def drawn_bits(tuner, tensor: str) -> float:
    return tuner.charts["bits"].frame.filter(tensor=tensor)["bits"].mean()


def now(tuner) -> dict[str, float]:
    return dict(tuner.charts["frontier"].frame.filter(role="now").select("kind", "loss").iter_rows())


# from Python


def test_a_budget_set_twice_changes_every_chart_twice(tuner_of):
    tuner, kind = tuner_of
    seen = []
    for bits in (3.25, 4.25, 5.25):
        turn(lambda bits=bits: setattr(tuner, "budget", bits))
        assert tuner.budget == vl.allocate.AverageBits(bits)
        losses = tuner.charts["losses"].frame.filter(kind=kind)["predicted_loss"].sum()
        seen.append((drawn_bits(tuner, "keys") + drawn_bits(tuner, "values"), -losses, -now(tuner)[kind]))
    assert all(len(set(column)) == 3 for column in zip(*seen, strict=True))
    assert seen == sorted(seen)


def test_the_charts_show_the_tables(tuner, rates):
    tuner.budget = vl.allocate.BytesPerToken(rates.solve(4.25).bytes_per_token)
    expected = rates.solve(4.25)
    assert tuner.plan == expected.plan
    heads = rates.heads(expected.plan)
    assert (
        tuner.charts["bits"]
        .frame.sort("layer", "tensor", "head")
        .equals(heads.select(tuner.charts["bits"].frame.columns).sort("layer", "tensor", "head"))
    )
    assert now(tuner)["allocated"] == pytest.approx(expected.predicted_loss)
    assert now(tuner)["uniform"] == pytest.approx(rates.predicted_loss(rates.uniform(4.25)))
    assert f"{expected.predicted_loss:.3g} nats a token" in tuner._told.value


@pytest.mark.parametrize(
    "budget",
    [
        vl.allocate.AverageBits(4.0),
        vl.allocate.BytesPerToken(500.0),
        vl.allocate.TokensInMemory(2000, 1.5),
        vl.allocate.QualityFloor(0.003),
    ],
)
def test_a_budget_of_any_kind_is_shown_by_its_own_knobs(tuner, budget):
    tuner.budget = budget
    control = tuner._controls
    assert control.kind.value is type(budget)
    knobs = control.slot.children
    assert [knob.value for knob in knobs] == pytest.approx(list(vars(budget).values()))
    assert tuner.budget == budget  # showing it changes nothing


def test_bounds_hold_and_are_shown(tuner):
    tuner.tune(budget=4.5, bounds=vl.allocate.Bounds(3, 5, protected_first=1, protection="widest"))
    bits = tuner.charts["bits"].frame
    assert set(bits["bits"]) <= {3, 4, 5}
    assert set(bits.filter(layer=0)["bits"]) == {5}
    assert tuner._controls.widths.value == (3, 5)
    assert tuner._controls.first.value == 1
    tuner.tune(budget=16.0, bounds=vl.allocate.Bounds(protected_last=1, protection="exact"))
    assert set(tuner.charts["bits"].frame.filter(layer=3)["method"]) == {"none"}
    assert "grey: 4 kept exact" in tuner.charts["bits"].content["params"]["caption"]
    # exact layers have more bits than the axis had, and it is extended to them
    most, usual = tuner.charts["frontier"].frame["true_bits"].max(), tuner.everything["true_bits"]
    assert most > usual.max()
    assert f'"domain": [{usual.min()}, {most}]' in json.dumps(tuner.charts["frontier"].to_dict())


def test_several_parts_are_set_at_once_or_none(tuner):
    tuner.tune(budget=5.0, bounds=vl.allocate.Bounds(4, 6), key_weight=2.0)
    before = tuner.setting
    assert before == Setting(vl.allocate.AverageBits(5.0), vl.allocate.Bounds(4, 6), 2.0)
    tuner.tune(budget=4.25)
    assert "Nothing is allocated: this budget allows only the bounds' least width, 4" in html.unescape(
        tuner._told.value
    )
    tuner.tune(budget=5.0)
    assert "Nothing" not in tuner._told.value
    for parts, sentence in (
        ({"budget": 2.25}, "give more, or allow fewer bits"),
        ({"budget": "much"}, "budget='much' cannot be used"),
        ({"key_weight": 0.0}, "key_weight=0.0 cannot be used"),
        ({"budget": vl.allocate.QualityFloor(1e-9)}, "cannot be reached"),
    ):
        with pytest.raises(InputError, match=sentence):
            tuner.tune(**parts)
        assert tuner.setting == before


def test_keys_that_weigh_more_get_more_bits(tuner):
    before = drawn_bits(tuner, "keys")
    tuner.key_weight = 10_000.0
    assert drawn_bits(tuner, "keys") > before
    assert tuner._controls.key_weight.value == 16.0  # the control's limit
    assert tuner.key_weight == 10_000.0


def test_a_layer_is_picked_in_python_or_in_a_chart(tuner):
    tuner.layer = 2
    assert tuner.charts["bits"].picked == 2
    tuner.charts["bits"].picked = 1
    assert tuner.layer == 1
    with pytest.raises(InputError, match="There is no layer 9: choose one from 0 to 3"):
        tuner.layer = 9


# by hand


def test_every_knob_of_the_budget_twice(tuner):
    control = tuner._controls
    for kind, values in (
        (vl.allocate.AverageBits, (4.0, 3.0)),
        (vl.allocate.BytesPerToken, (500.0, 600.0)),
        (vl.allocate.TokensInMemory, (2.5, 3.0)),
        (vl.allocate.QualityFloor, (0.004, 0.002)),
    ):
        knob = control.numbers[kind][-1]
        turn(lambda kind=kind: setattr(control.kind, "value", kind))
        assert type(tuner.budget) is kind
        for value in values:
            turn(lambda knob=knob, value=value: setattr(knob, "value", value))
            assert list(vars(tuner.budget).values())[-1] == pytest.approx(value)
    assert tuner._message.value == ""


@pytest.mark.parametrize(
    "kind", [vl.allocate.BytesPerToken, vl.allocate.TokensInMemory, vl.allocate.QualityFloor, vl.allocate.AverageBits]
)
def test_another_kind_of_budget_keeps_the_plan(tuner, kind):
    before = tuner.plan
    tuner._controls.kind.value = kind
    assert type(tuner.budget) is kind
    assert tuner.plan.layers == before.layers


def test_a_longer_text_gets_the_least_memory_that_fits(tuner):
    tuner._controls.kind.value = vl.allocate.TokensInMemory
    tuner._controls.tokens.value = 40_000
    assert tuner.budget.tokens == 40_000
    assert "it was set to the nearest one" in tuner._message.value
    assert drawn_bits(tuner, "keys") == drawn_bits(tuner, "values") == 1
    turn(lambda: setattr(tuner._controls.megabytes, "value", tuner._controls.megabytes.max))
    assert drawn_bits(tuner, "keys") == 6
    assert tuner._message.value == ""


def test_the_slider_of_memory_ends_at_the_limit_of_this_process(tuner, monkeypatch):
    tuner._controls.kind.value = vl.allocate.TokensInMemory
    tuner.budget = vl.allocate.TokensInMemory(2_000, 1.5)
    assert tuner._controls.megabytes.max > 1.6
    monkeypatch.setattr(budget_controls, "device", lambda: Device("cpu", "small", 1_600_000, 1))
    tuner.budget = vl.allocate.TokensInMemory(2_000, 1.4)
    assert tuner._controls.megabytes.max == 1.6
    tuner.budget = vl.allocate.TokensInMemory(2_000, 1.7)  # set in Python, perhaps for another machine
    assert tuner._controls.megabytes.value == tuner._controls.megabytes.max == 1.7


def test_an_impossible_choice_by_hand_is_reported_and_nothing_changes(tuner):
    tuner._controls.kind.value = vl.allocate.TokensInMemory
    before = tuner.setting
    turn(lambda: setattr(tuner._controls.tokens, "value", 3))
    assert "3 tokens are all kept exact" in tuner._message.value
    assert tuner.setting is before
    assert tuner._controls.tokens.value == before.budget.tokens  # the controls show the current state
    turn(lambda: setattr(tuner._controls.tokens, "value", 900))
    assert tuner.budget.tokens == 900


def test_every_bound_by_hand_twice(tuner):
    control = tuner._controls
    tuner.budget = 4.5
    for knob, values in (
        (control.widths, ((3, 6), (3, 5))),
        (control.first, (1, 2)),
        (control.last, (1, 0)),
        (control.keys_first, (True, False)),
        (control.key_weight, (2.0, 0.5)),
        (control.protection, ("exact", "widest")),
    ):
        for value in values:
            before = tuner.setting
            turn(lambda knob=knob, value=value: setattr(knob, "value", value))
            assert tuner.setting != before
    assert tuner.bounds == vl.allocate.Bounds(3, 5, 2, 0)
    assert tuner.key_weight == 0.5
    assert set(tuner.charts["bits"].frame["bits"]) <= {3, 4, 5}


def test_bounds_that_cannot_spend_the_budget_move_it(tuner):
    turn(lambda: setattr(tuner._controls.widths, "value", (5, 6)))
    assert tuner.bounds == vl.allocate.Bounds(5, 6)
    assert tuner.budget == vl.allocate.AverageBits(tuner.rates.spans(vl.allocate.Bounds(5, 6), 1).bits[0])
    assert "it was set to the nearest one" in tuner._message.value


# measuring


def test_a_measured_plan_stands_beside_its_prediction(tuner_of, model, fitted):
    tuner, kind = tuner_of
    name = "ratequant" if kind == "allocated" else kind
    tuner.measure()
    assert tuner.wait(PATIENCE)
    tuner.measure("uniform")
    assert tuner.wait(PATIENCE)
    assert dict(tuner.measured.schema) == EVALUATED
    assert tuner.measured["name"].to_list() == [f"{name} 3.25 bits", "uniform 3.25 bits"]
    first = tuner.measured.row(0, named=True)
    assert first["predicted_loss"] == pytest.approx(tuner.allocation.predicted_loss)
    assert first["true_bits"] == pytest.approx(tuner.allocation.true_bits)
    expected = vl.fidelity(model, Letters(), tuner.plan, text=TEXT, tokens=48, calibration=[fitted])
    assert first["kl_mean"] == pytest.approx(expected["kl_mean"].item(), rel=1e-5)
    shown = tuner.charts["frontier"].frame.filter(role="measured")
    assert shown["kind"].to_list() == [kind, "uniform"]
    assert shown["loss"].to_list() == tuner.measured["kl_mean"].to_list()
    assert tuner._history.value.index("uniform 3.25 bits") < tuner._history.value.index(f"{name} 3.25 bits")
    tuner.budget = 5.0  # the measurement stays
    assert tuner.charts["frontier"].frame.filter(role="measured").height == 2


def test_another_method_with_a_prediction_is_found_by_its_declaration(rates, fitted):
    vl.register(replace(METHODS["fisherquant"], id="other", name="Other", codecs=(FisherQuant,)))
    try:
        both = [rates.with_calibration(replace(fitted, method=method)) for method in ("fisherquant", "other")]
        with pytest.raises(InputError, match="These tables have fisherquant already"):
            both[0].with_calibration(replace(fitted, method="other"))
        tuner = vl.widgets.BudgetTuner(both[1], budget=2.125, bounds=vl.allocate.Bounds(methods=("other",)))
        assert (
            tuner.allocation.predicted_loss
            == both[0].solve(2.125, vl.allocate.Bounds(methods=("fisherquant",))).predicted_loss
        )
        assert set(tuner.charts["frontier"].frame["kind"]) == {"allocated", "uniform", "other"}
        assert tuner.rates.coordinates(tuner.plan)["method"].unique().to_list() == ["other"]
        assert "coordinates" in tuner.charts
        tuner.worker.close()
    finally:
        vl.codecs.unregister("other")


def test_fisherquant_is_added_by_a_button_and_chosen_by_a_knob(rates, fitted, model):
    tuner = vl.widgets.BudgetTuner(rates, model, Letters(), budget=3.25, calibration=fitted)
    before = tuner.allocation
    controls(tuner)["Add FisherQuant"].click()
    assert tuner.wait(PATIENCE)
    assert "Add FisherQuant" not in controls(tuner)
    assert tuner.budget == vl.allocate.AverageBits(3.25)
    assert tuner.allocation.predicted_loss < before.predicted_loss
    assert tuner._controls.method.value == "fisherquant"
    assert 'vl.calibrate(model, tokenizer, "fisherquant")' in html.unescape(tuner._file.code.value)
    bits = tuner.charts["coordinates"].frame
    assert bits["bits"].mean() == pytest.approx(3.25 - 4 / 64, abs=0.02)  # 4 bits of each vector are for its scale
    assert set(tuner.charts["frontier"].frame["kind"]) == {"allocated", "uniform", "fisherquant"}
    tuner.budget = 2.125  # a fraction; no head has its least bits
    assert "Nothing" not in tuner._told.value
    turn(lambda: setattr(tuner._controls.method, "value", "ratequant"))
    assert tuner.bounds == vl.allocate.Bounds(methods=("ratequant",))
    assert tuner.allocation.plan.layers == rates.plan(2.125).layers
    tuner.worker.close()


def test_measuring_can_be_cancelled_and_the_tuner_still_works(tuner):
    tuner.measure()
    tuner.worker.cancel()
    assert tuner.wait(PATIENCE)
    assert tuner.measured.is_empty()
    tuner.budget = 4.0
    assert drawn_bits(tuner, "keys") > 0
    tuner.measure()
    assert tuner.wait(PATIENCE)
    assert tuner.measured.height == 1


def test_errors_of_a_measurement_are_shown(rates, model):
    tuner = vl.widgets.BudgetTuner(rates, model, Letters(), budget=3.25, text="a", tokens=48)
    tuner.measure()
    assert tuner.wait(PATIENCE)
    assert "give a longer text" in tuner._message.value
    assert tuner.measured.is_empty()
    tuner.budget = 4.0
    assert tuner._message.value == ""
    tuner.worker.close()


def test_losses_that_are_no_divergences_are_not_compared_with_one(model, folder):
    rates = vl.rate_budget(model, Letters(), text=TEXT, by="key_norm", folder=folder, **MEASURED)
    tuner = vl.widgets.BudgetTuner(rates, model, Letters(), budget=3.25, text=TEXT, tokens=48)
    tuner.measure()
    assert tuner.wait(PATIENCE)
    assert tuner.measured.height == 1
    assert tuner.charts["frontier"].frame.filter(role="measured").is_empty()
    assert "in the unit of key_norm" in repr(tuner)
    assert "not divergences" in tuner.charts["frontier"].content["params"]["caption"]
    tuner.worker.close()


# without a model, and with a model only


def test_tables_from_disk_need_a_model_only_to_measure(rates, tmp_path):
    tuner = vl.widgets.BudgetTuner(vl.allocate.RateBudget.load(rates.save(tmp_path / "rates.json")))
    before = drawn_bits(tuner, "keys")
    tuner.budget = 6.0
    assert drawn_bits(tuner, "keys") > before
    assert tuner.save(tmp_path / "plan.json").is_file()
    with pytest.raises(InputError, match="needs the model"):
        tuner.measure()
    assert all(controls(tuner)[name].disabled for name in ("Measure", "Measure uniform", "Add FisherQuant"))


def test_a_model_is_measured_first_and_its_tables_are_found_again(model, tmp_path, monkeypatch):
    given: dict[str, Any] = {"budget": 3.25, "rate_settings": {"text": TEXT, "folder": tmp_path, **MEASURED}}
    tuner = vl.widgets.BudgetTuner(model, Letters(), **given)
    assert any(isinstance(part, ProgressBar) for part in lifetime.parts(tuner))
    assert tuner.wait(PATIENCE)
    assert repr(tuner) == "BudgetTuner(no tables yet)"  # no long measurement without a request
    assert "gradients of 2 texts of 64 tokens" in tuner._message.value
    controls(tuner)["Measure tables (2 × 64 tokens)"].click()
    assert tuner.wait(PATIENCE)
    assert tuner.budget == vl.allocate.AverageBits(3.25)
    tuner.budget = 5.0
    monkeypatch.setattr(ratequant, "rate_budget", lambda *_, **__: pytest.fail("it was measured again"))
    other = vl.widgets.BudgetTuner(model, Letters(), **given)
    assert other.wait(PATIENCE)
    assert other.rates.identity == tuner.rates.identity
    tuner.worker.close()
    other.worker.close()


def test_a_cancelled_start_can_be_repeated(model, tmp_path):
    tuner = vl.widgets.BudgetTuner(model, Letters(), rate_settings={"text": TEXT, "folder": tmp_path, **MEASURED})
    tuner.start()
    tuner.worker.cancel()
    assert tuner.wait(PATIENCE)
    tuner.layer = 1  # picked once the charts exist
    for knob in (lambda: tuner.plan, lambda: setattr(tuner, "budget", 3.0)):
        with pytest.raises(InputError, match="not measured yet"):
            knob()
    controls(tuner)["Measure tables (2 × 64 tokens)"].click()
    assert tuner.wait(PATIENCE)
    assert tuner.plan.layers
    assert tuner.charts["bits"].picked == 1
    children = tuner.children
    tuner.start()
    assert tuner.wait(PATIENCE)
    assert tuner.children == children  # the tables exist
    tuner.worker.close()


def test_an_impossible_budget_is_reported_once_the_tables_exist(model, tmp_path):
    tuner = vl.widgets.BudgetTuner(
        model, Letters(), budget=1.0, rate_settings={"text": TEXT, "folder": tmp_path, **MEASURED}
    )
    tuner.start()
    assert tuner.wait(PATIENCE)
    assert "give more, or allow fewer bits" in tuner._message.value
    assert tuner._message in lifetime.parts(tuner)
    tuner.worker.close()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda rates, model: vl.widgets.BudgetTuner(rates, model), "a model needs its tokenizer"),
        (lambda rates, model: vl.widgets.BudgetTuner(model), "a model needs its tokenizer"),
        (
            lambda rates, model: vl.widgets.BudgetTuner(rates, tiny("llama"), Letters()),
            "These tables are of llama of 4 layers",
        ),
        (
            lambda rates, model: vl.widgets.BudgetTuner(rates, rate_settings={"bits": (2, 3)}),
            "rate_settings have no use",
        ),
        (lambda rates, model: vl.widgets.BudgetTuner(rates, budget=0.5), "give more, or allow fewer bits"),
    ],
)
def test_an_impossible_tuner_is_refused_in_a_sentence(rates, model, make, sentence):
    with pytest.raises(InputError, match=sentence):
        make(rates, model)


# saving


def test_a_plan_is_saved_at_the_path_in_the_box(tuner, tmp_path):
    box = tuner._file
    box.path.value = str(tmp_path / "mine.json")
    assert f'vl.Plan.load("{tmp_path}/mine.json")' in box.code.value.replace("&quot;", '"')
    box.button.click()
    assert f"Saved to {tmp_path}/mine.json" in box.said.value
    assert vl.Plan.load(tmp_path / "mine.json") == tuner.plan
    for path, sentence in (
        (tmp_path, "is a folder: give the name of a file"),
        (tmp_path / "none" / "plan.json", "There is no folder"),
    ):
        box.path.value = str(path)
        box.button.click()
        assert sentence in box.said.value


def test_a_place_without_write_access_is_reported(tuner):
    with pytest.raises(InputError, match=r"/proc/plan.json cannot be written \(.+\): choose another place"):
        tuner.save("/proc/plan.json")


def test_without_a_kernel_an_image_and_a_line_of_numbers_are_saved(tuner):
    bundle, _ = tuner._repr_mimebundle_()
    assert bundle["text/plain"].startswith("BudgetTuner(3.25 true bits a value, 416 bytes a token; code bits: keys ")
    assert png_size(base64.b64decode(bundle["image/png"]))[0] == 700
