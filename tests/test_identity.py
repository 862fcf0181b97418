"""Models are told apart by their current state, not by their state when they were first used."""

import time

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.mlxlm import identity, probe

IDS = list(range(1, 90))
SEED = 13  # different from all models of other tests


@pytest.fixture
def model():
    return tiny("llama", seed=SEED)


def scaled(model):
    model.layers[1].self_attn.k_proj.weight *= 3


def one_column(model):
    weight = model.layers[0].self_attn.k_proj.weight
    weight[:, 5:15] = weight[:, 5:15] * 2


def adapted(model):
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": {"self_attn.q_proj"}})


def fused(model):
    """Return a model with an effective adapter merged into its weights."""
    adapted(model)
    adapters = [(name, module) for name, module in model.named_modules() if hasattr(module, "fuse")]
    for _, module in adapters:
        module.lora_b = mx.ones_like(module.lora_b)
    model.update_modules(tree_unflatten([(name, module.fuse()) for name, module in adapters]))


CHANGES = {
    "scaled in place": scaled,
    "some columns": one_column,
    "an adapter that does nothing yet": adapted,
    "a fused adapter": fused,
    "a cast": lambda model: model.set_dtype(mx.bfloat16),
    "quantized": nn.quantize,
    "another rotation": lambda model: setattr(model.layers[0].self_attn.rope, "base", 5e5),
    "fewer layers": lambda model: setattr(model.model, "layers", model.model.layers[:1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_another_model(model, change, tmp_path):
    """Its old caches are refused, by both readers, and its new ones are read."""
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    save_prompt_cache(str(before), vl.make_cache(model))
    change(model)
    for read in (lambda: vl.load_cache(before, model), lambda: load_prompt_cache(str(before))):
        with pytest.raises(InputError, match="the model llama of 2 layers, "):
            read()
    cache = vl.make_cache(model)
    model(mx.array([IDS]), cache=cache)
    save_prompt_cache(str(after), cache)
    assert [c.offset for c in vl.load_cache(after, model)] == [len(IDS)] * len(model.layers)
    assert len(load_prompt_cache(str(after))) == len(model.layers)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "none"), ("mamba2", "turboquant"), ("falcon_h1", "none"), ("gemma3_text", "none")]
)
def test_a_file_of_another_model_is_refused_for_every_kind_of_layer(family, method, tmp_path):
    """Exact tokens alone, states alone, or states beside tokens: layers without codes name their model too."""
    file, model = tmp_path / "prompt.safetensors", tiny(family, seed=SEED)
    cache = vl.make_cache(model, method, window=1000)
    model(mx.array([IDS]), cache=cache)
    save_prompt_cache(str(file), cache)
    assert len(vl.load_cache(file, model)) == len(cache)
    with pytest.raises(InputError, match=f"made for the model {family} of . layers, .* and this is {family}"):
        vl.load_cache(file, tiny(family, seed=SEED + 1))
    with pytest.raises(InputError, match=f"made for the model {family} of"):
        vl.load_cache(file, tiny(family, seed=SEED, num_hidden_layers=4))


def test_a_change_that_is_undone_does_not_count(model, tmp_path):
    file = tmp_path / "prompt.safetensors"
    save_prompt_cache(str(file), vl.make_cache(model))
    scaled(model)
    vl.make_cache(model)
    model.layers[1].self_attn.k_proj.weight = tiny("llama", seed=SEED).layers[1].self_attn.k_proj.weight
    assert len(vl.load_cache(file, model)) == 2


def test_a_model_with_fewer_layers_is_probed_again(model):
    assert len(probe.probe(model)) == 2
    model.model.layers = model.model.layers[:1]
    assert len(probe.probe(model)) == 1
    assert len(vl.make_cache(model)) == 1


def test_the_order_of_attributes_does_not_matter(model):
    other = tiny("llama", seed=SEED)
    attention = other.layers[0].self_attn
    attention["q_proj"] = attention.pop("q_proj")
    assert list(attention) != list(model.layers[0].self_attn)
    assert identity.fingerprint(other) == identity.fingerprint(model)


def test_a_fingerprint_is_cheap(smollm2):
    model, _ = smollm2
    identity.fingerprint(model)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        identity.fingerprint(model)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
