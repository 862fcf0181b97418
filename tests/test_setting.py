"""Allocation requests: settings of each budget, plans from them, and keys weighted against values."""

from typing import Any

import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.allocate.budget import Setting
from veloxlab.allocate.ratequant import kept_rate_budget
from veloxlab.errors import InputError

MEASURED: dict[str, Any] = {"sequences": 2, "tokens": 64, "sinks": 2, "window": 8}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rates")


@pytest.fixture(scope="module")
def rates(model, folder):
    return vl.rate_budget(model, Letters(), text=TEXT, folder=folder, **MEASURED)


def solved(rates, setting):
    return rates.solve(setting.budget, setting.bounds, key_weight=setting.key_weight)


def mean_bits(allocation, rates, tensor):
    return rates.heads(allocation.plan).filter(tensor=tensor)["bits"].mean()


def test_without_a_weight_the_result_is_the_plain_allocation(rates):
    found, plain = solved(rates, Setting(3.25)), rates.solve(vl.allocate.AverageBits(3.25))
    assert found.plan == plain.plan
    assert (found.predicted_loss, found.predicted_least) == (plain.predicted_loss, plain.predicted_least)


def test_uniform_bits_use_the_spent_bytes_and_not_the_budget(rates):
    budget, bounds = vl.allocate.AverageBits(9.0), vl.allocate.Bounds(2, 3)
    for found in (solved(rates, Setting(budget, bounds)), rates.solve(budget, bounds)):
        assert found.true_bits == pytest.approx(3.25)
        assert rates.bytes_per_token(found.uniform) == pytest.approx(found.bytes_per_token)
        assert found.predicted_uniform_loss == pytest.approx(found.predicted_loss)  # all at 3 bits, both


def test_the_bits_of_heads_add_up_to_the_plan(rates):
    found = rates.solve(3.25)
    heads = rates.heads(found.plan)
    assert heads.height == 3 * 2 * 2  # layers, heads, sides
    assert heads["predicted_loss"].sum() == pytest.approx(found.predicted_loss)
    assert rates.bytes_per_token(found.plan) == pytest.approx(found.bytes_per_token)
    assert rates.true_bits(found.plan) == pytest.approx(found.true_bits)
    for (layer, tensor), own in heads.group_by("layer", "tensor"):
        assert tuple(own.sort("head")["bits"]) == found.plan.widths(layer, tensor)


def test_exact_layers_have_no_loss_and_all_bytes(rates):
    found = rates.solve(16.0, vl.allocate.Bounds(protected_first=1, protection="exact"))
    exact = rates.heads(found.plan).filter(layer=0)
    assert set(exact["method"]) == {"none"}
    assert exact["predicted_loss"].to_list() == [0.0] * 4
    codes = rates.held_bytes(rates.plan(16.0), 1000)
    assert rates.held_bytes(found.plan, 1000) > codes  # 32 bits in one layer, and the widest in the others


@pytest.mark.parametrize("tokens", [200, 1000])
def test_a_plan_uses_the_memory_of_its_budget(rates, tokens):
    for megabytes in (0.11, 0.13):
        budget = vl.allocate.TokensInMemory(tokens, megabytes * tokens / 200)
        held = rates.held_bytes(rates.plan(budget), tokens)
        assert 0.97 * budget.megabytes <= held / 1e6 <= budget.megabytes  # a step gives a head a bit in each token


@pytest.mark.parametrize(
    "bounds",
    [vl.allocate.Bounds(), vl.allocate.Bounds(3, 5, protected_last=1), vl.allocate.Bounds(keys_over_values=True)],
)
def test_every_budget_within_the_spans_is_allocated_and_none_below(rates, bounds):
    spans = rates.spans(bounds, 500)
    for kind, (least, most) in (
        (vl.allocate.AverageBits, spans.bits),
        (vl.allocate.BytesPerToken, spans.nbytes),
        (lambda end: vl.allocate.TokensInMemory(500, end), spans.megabytes),
        (vl.allocate.QualityFloor, spans.predicted_loss),
    ):
        for end in (least, (least + most) / 2, most):
            solved(rates, Setting(kind(end), bounds))
        with pytest.raises(InputError):
            solved(rates, Setting(kind(0.99 * least), bounds))


def test_a_budget_is_moved_to_the_nearest_one_within_the_spans(rates):
    spans = rates.spans(vl.allocate.Bounds(3, 5), 500)
    assert spans.nearest(vl.allocate.AverageBits(1)) == vl.allocate.AverageBits(spans.bits[0])
    assert spans.nearest(vl.allocate.BytesPerToken(1e9)) == vl.allocate.BytesPerToken(spans.nbytes[1])
    assert spans.nearest(vl.allocate.TokensInMemory(500, 1e-9)) == vl.allocate.TokensInMemory(500, spans.megabytes[0])
    assert spans.nearest(vl.allocate.QualityFloor(1e9)) == vl.allocate.QualityFloor(spans.predicted_loss[1])
    inside = vl.allocate.AverageBits(sum(spans.bits) / 2)
    assert spans.nearest(inside) == inside


def test_keys_that_count_more_get_more_bits_in_the_same_bytes(rates):
    plain, more, less = (solved(rates, Setting(3.25, key_weight=weight)) for weight in (1.0, 1e4, 1e-4))
    assert mean_bits(less, rates, "keys") <= mean_bits(plain, rates, "keys") < mean_bits(more, rates, "keys")
    for found in (more, less):
        assert found.bytes_per_token == pytest.approx(plain.bytes_per_token, rel=0.02)  # a bit of one head
        assert found.predicted_loss == pytest.approx(rates.predicted_loss(found.plan))
        assert found.predicted_loss >= plain.predicted_loss  # as measured, no plan of these bytes loses less
        assert found.predicted_uniform_loss == rates.predicted_loss(found.uniform)
        assert found.predicted_least is None
        assert found.plan.allocation == found.uniform.allocation == rates.identity


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_a_floor_of_quality_is_of_the_measured_loss_for_any_key_weight(rates, weight):
    floor = solved(rates, Setting(3.25)).predicted_loss
    found = solved(rates, Setting(vl.allocate.QualityFloor(floor), key_weight=weight))
    assert found.predicted_loss <= floor * (1 + 1e-9)
    assert found.bytes_per_token >= solved(rates, Setting(vl.allocate.QualityFloor(floor))).bytes_per_token
    fewer = solved(rates, Setting(vl.allocate.BytesPerToken(found.bytes_per_token - 8), key_weight=weight))
    assert fewer.predicted_loss > floor  # a head's next bit takes 8 bytes


def test_below_the_least_width_there_are_no_uniform_bits_to_compare_with(model, folder):
    rates = vl.rate_budget(
        model, Letters(), ("ratequant", "polarquant"), TEXT, bits=(2, 3, 4), folder=folder, **MEASURED
    )
    found = solved(rates, Setting(2.1, key_weight=2.0))  # PolarQuant has no scales: 2 bits are 2.00
    assert found.uniform is found.predicted_uniform_loss is None
    assert found.predicted_loss > 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Setting("3"), "budget='3' cannot be used: give vl.allocate.AverageBits, .* or a number of true bits"),
        (lambda: Setting(3.0, key_weight=0.0), "key_weight=0.0 cannot be used: give a finite number above 0"),
    ],
)
def test_settings_without_effect_are_refused(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_a_loss_that_no_weight_can_reach_is_refused(rates):
    with pytest.raises(InputError, match="cannot be reached: the most bits lose"):
        solved(rates, Setting(vl.allocate.QualityFloor(1e-9), key_weight=2.0))


def test_measurements_are_kept_and_found_again_by_their_settings(model, folder, tmp_path):
    told = []

    def progress(done, total, label):
        told.append(label)

    given = {"text": TEXT, "folder": tmp_path, "progress": progress, **MEASURED}
    first = kept_rate_budget(model, Letters(), **given)
    assert "distortion of layer 0" in told
    told.clear()
    assert kept_rate_budget(model, Letters(), **given).identity == first.identity
    assert told == []
    kept_rate_budget(model, Letters(), **given, bits=range(2, 4))
    assert "distortion of layer 0" in told
    file = next(path for path in tmp_path.glob("*.json") if '"veloxlab rate budget' in path.read_text())
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text().replace('"layer"', '"lair"'))
    told.clear()
    with pytest.warns(UserWarning, match="The file is made again now"):
        assert kept_rate_budget(model, Letters(), **given).identity == first.identity
    assert told != []
    assert file.exists()


def test_measurements_of_another_model_are_named_and_made_again(model, tmp_path):
    given: dict[str, Any] = {"text": TEXT, "folder": tmp_path, "by": "key_norm", "bits": (2, 3), **MEASURED}
    first, other = (
        kept_rate_budget(one, Letters(), **given) for one in (model, tiny("llama", seed=1, num_hidden_layers=3))
    )
    mine, theirs = sorted(
        (p for p in tmp_path.glob("*.json") if "key_norm" not in p.name),
        key=lambda p: first.model in p.read_text(),
        reverse=True,
    )
    mine.write_bytes(theirs.read_bytes())
    with pytest.warns(
        UserWarning, match=f"are of {other.model}, and this model is {first.model}. The file is made again"
    ):
        assert kept_rate_budget(model, Letters(), **given).identity == first.identity


def test_measurements_are_found_again_by_the_calibrations_identities(model, tmp_path):
    fitted = [vl.calibrate(model, Letters(), "spectralquant", bits=3, seed=seed, folder=tmp_path) for seed in (0, 1)]
    given = {"methods": ["spectralquant"], "bits": (3,), "text": TEXT, "folder": tmp_path, **MEASURED}
    first, other = (kept_rate_budget(model, Letters(), calibrations=[one], **given) for one in fitted)
    assert first.calibrations != other.calibrations
    assert kept_rate_budget(model, Letters(), calibrations=fitted[:1], **given).identity == first.identity
