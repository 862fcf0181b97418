"""A plan is a readable file that makes the planned cache, for its model and no other."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import pytest

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure import code_bits, token_errors


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


def test_a_plan_survives_its_file(model, tmp_path):
    plan = vl.Plan.uniform(model, bits=3, value_bits=2, sinks=1, rotation="haar").with_layer(1, key_bits=8)
    assert vl.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert json.loads((tmp_path / "plan.json").read_text())["layers"][1]["key_bits"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_cache_follows_its_plan(model):
    plan = vl.Plan.uniform(model, bits=3, sinks=1, window=5, chunk="codes").with_layer(1, key_bits=8, value_bits=2)
    first, second = vl.make_cache(model, plan)
    assert (first.key_codec.bits, first.value_codec.bits) == (3, 3)
    assert (second.key_codec.bits, second.value_codec.bits) == (8, 2)
    assert (first.max_sinks, first.window, first.chunk) == (1, 5, "codes")
    assert plan.frame["key_bits"].to_list() == [3, 8]


def test_a_uniform_plan_makes_the_method_s_cache(model):
    ids = mx.arange(40)[None]
    by_plan = model(ids, cache=vl.make_cache(model, vl.Plan.uniform(model, bits=2)))
    by_name = model(ids, cache=vl.make_cache(model, "turboquant", bits=2))
    assert mx.array_equal(by_plan, by_name)


def test_a_plan_for_another_model_is_refused(model):
    other = tiny("llama", num_key_value_heads=4)
    with pytest.raises(InputError, match="was made for a model with hash .* Make a plan for it"):
        vl.make_cache(other, vl.Plan.uniform(model))


def test_fidelity_measures_a_plan_as_it_measures_the_method(smollm2):
    plan = vl.Plan.uniform(smollm2[0], bits=6, sinks=0, window=0)
    row = vl.fidelity(*smollm2, plan, tokens=32)
    assert row.select("name", "chunk", "key_bits").row(0) == ("turboquant K6 V6", "codes", 6.25)
    assert row.equals(vl.fidelity(*smollm2, bits=6, sinks=0, window=0, tokens=32))


def test_bits_beside_a_plan_are_refused_and_exact_tokens_can_be_changed(model):
    plan = vl.Plan.uniform(model)
    for name, value in (("bits", 3), ("key_bits", 3), ("rotation", "haar")):
        with pytest.raises(InputError, match=f"{name} was given together with a plan"):
            vl.make_cache(model, plan, **{name: value})
    assert vl.make_cache(model, plan, sinks=0, window=9)[0].window == 9


def test_a_plan_of_a_version_before_allocations_is_read(model, tmp_path):
    plan = vl.Plan.uniform(model, "ratequant", bits=3).with_layer(0, options={"head_bits": {"keys": [4, 2]}})
    content = json.loads(plan.save(tmp_path / "plan.json").read_text())
    for name in ("model", "allocation", "calibrations", "sha256"):
        del content[name]
    for layer in content["layers"]:
        del layer["key_options"], layer["value_options"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    loaded = vl.Plan.load(tmp_path / "plan.json")
    assert loaded.layers == plan.layers
    assert [loaded.widths(0, side) for side in ("keys", "values")] == [(4, 2), (3,)]


def test_options_of_one_tensor_do_not_apply_to_the_other(model):
    plan = vl.Plan.uniform(model, "none", bits=32).with_layer(
        0, key_method="ratequant", key_bits=3, key_options={"head_bits": [4, 3]}
    )
    first, _ = vl.make_cache(model, plan)
    assert first.key_codec.head_bits == (4, 3)
    assert first.value_codec.bits == 32
    assert plan.frame["key_bits"].to_list() == [3.5, 32]
    with pytest.raises(InputError, match="has no option 'head_bits'"):
        plan.with_layer(0, value_options={"head_bits": [4, 3]})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read .there is no such file"),
        ("{", "cannot be read .Expecting property name"),
        ("[]", "cannot be read .it is not of the format 'veloxlab plan 1'"),
        ('{"format": "veloxlab plan 9"}', "it is not of the format"),
        ('{"format": "veloxlab plan 1", "layers": [{"bits": 3}]}', "unexpected keyword argument 'bits'"),
        ('{"format": "veloxlab plan 1"}', "cannot be read .it has no 'layers'"),
    ],
)
def test_a_file_without_a_plan_is_refused(tmp_path, content, sentence):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        vl.Plan.load(path)


def test_an_impossible_plan_is_refused_before_it_can_be_saved(model):
    plan = vl.Plan.uniform(model)
    with pytest.raises(InputError, match="Values at bits=12 are out of range"):
        plan.with_layer(0, value_bits=12)
    with pytest.raises(InputError, match="has layers 0 to 1, and no layer 5"):
        plan.with_layer(5, key_bits=2)
    with pytest.raises(InputError, match="Unknown method"):
        vl.Plan.uniform(model, "turbo")


def test_an_exact_plan_is_made_without_a_width(model):
    plan = vl.Plan.uniform(model, "none")
    assert plan.name == "none"
    ids = mx.arange(40)[None]
    assert mx.array_equal(model(ids, cache=vl.make_cache(model, plan)), model(ids, cache=vl.make_cache(model, "none")))


ZERO_BITS = {
    "make_cache": vl.make_cache,
    "Plan.uniform": vl.Plan.uniform,
    "layer_errors": lambda model, **bits: vl.measure.layer_errors(_seen(model), **bits),
    "memory_growth": lambda model, **bits: vl.measure.memory_growth(_seen(model), upto=64, **bits),
    "plan_memory": vl.measure.plan_memory,
    "fidelity": lambda model, **bits: vl.fidelity(model, Letters(), text=TEXT, tokens=16, **bits),
}


@pytest.mark.parametrize("side", ["bits", "key_bits", "value_bits"])
@pytest.mark.parametrize("call", ZERO_BITS.values(), ids=ZERO_BITS)
def test_zero_bits_do_not_mean_the_default(model, call, side):
    with pytest.raises(InputError, match=f"{'Values' if side == 'value_bits' else 'Keys'} at bits=0 are out of range"):
        call(model, **{side: 0})


def test_outlier_channels_of_zero_bits_are_refused():
    with pytest.raises(InputError, match="bits=0 cannot be used"):
        find_method("turboquant").codec(64, 3, "keys", outliers=8, outlier_bits=0)


@pytest.mark.parametrize("call", [vl.measure.layer_errors, token_errors, vl.measure.memory_growth, code_bits])
def test_exact_values_are_measured_without_a_width(model, call):
    assert call(_seen(model), "none").height


def _seen(model):
    return vl.capture(model, Letters(), TEXT, tokens=16)


def test_a_plan_is_shown_in_one_line(model):
    plan = vl.Plan.uniform(model, "rabitq", bits=4)
    assert re.fullmatch(r"Plan\(2 × rabitq K4 V4; sinks=4, window=64; llama of 2 layers, [0-9a-f]{16}\)", repr(plan))
    mixed = plan.with_layer(1, value_method="qjl", value_bits=2)
    assert "(1 × rabitq K4 V4, 1 × rabitq K4 qjl V2; " in repr(mixed)
    other = replace(plan, layers=tuple(replace(plan.layers[0], key_bits=bits) for bits in (2, 3, 4, 5)), model="")
    assert repr(other) == f"Plan(4 layers of 4 kinds; sinks=4, window=64; {plan.model_hash})"
