"""A rotary embedding is identified by its effect on a layer's keys, not by the modules of the layer."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from tests.tiny_models import tiny
from veloxlab.codecs.parts.rope import Rope
from veloxlab.measure.activations import capture_layers
from veloxlab.mlxlm.ropes import ropes_of

IDS = [7 * i % 90 for i in range(40)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 64, "short_factor": 1.0, "long_factor": 4.0}
DYNAMIC: dict[str, Any] = {
    "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 512,
}
MIXED = {
    "smollm3": {},
    "cohere2": {"hidden_size": 256, "sliding_window": 16},
    "exaone4": {
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "rope_scaling": None,
        "sliding_window": 16,
        "sliding_window_pattern": "LLLG",
    },
    "llama4_text": {
        "intermediate_size_mlp": 64,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 1, 1, 0],
        "use_qk_norm": True,
    },
}


def made(model: llama.Model) -> mx.array:
    """Return keys of the first layer before their rotary embedding."""
    first = model.layers[0]
    x = first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(mx.array([IDS]))))
    return x.reshape(1, len(IDS), 2, -1).swapaxes(1, 2)


def distance(x: mx.array, y: mx.array) -> float:
    """Return the distance of two arrays over the length of the second."""
    return (mx.linalg.norm(x - y) / mx.linalg.norm(y)).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 4.0},
        LLAMA3,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        LONGROPE,
    ],
)
def test_a_layers_rope_is_found_and_undone(scaling, traditional, dtype):
    model = tiny("llama", rope_scaling=scaling, rope_traditional=traditional, max_position_embeddings=8192)
    model.set_dtype(dtype)
    (layer, _) = capture_layers(model, IDS)
    keys, x = layer.keys.astype(mx.float32), made(model).astype(mx.float32)
    back = layer.rope.inverse(keys, 0)
    x = x * (mx.linalg.norm(back) / mx.linalg.norm(x))  # some kinds change the length of keys
    bound = 1e-5 if dtype == mx.float32 else 2**-7  # angles of up to 40 radians; or keys rounded to 8 bits
    assert distance(back, x) < bound
    assert distance(layer.rope.forward(back, 0), keys) < 1e-5


@pytest.mark.parametrize("family", MIXED)
def test_layers_with_and_without_rope_are_told_apart(family):
    model = tiny(family, num_hidden_layers=4, **MIXED[family])
    assert [rope is not None for rope in ropes_of(model, IDS)] == [True, True, True, False]


def test_layers_with_rotary_embeddings_of_two_kinds_each_have_their_own():
    assert [rope.base for rope in ropes_of(tiny("gemma3_text"), IDS)] == [1e4, 1e4, 1e6]


def test_a_model_of_more_caches_than_layers_has_one_for_each_cache():
    model = tiny("iquestloopcoder", loop_window_size=16)
    assert [seen.rope.base for seen in capture_layers(model, IDS)] == [5e5] * (2 * len(model.layers))


@pytest.mark.parametrize("family", ["nanochat", "talkie"])
def test_frequencies_of_the_attention_module_are_found(family):
    (rope, _) = ropes_of(tiny(family), IDS)
    assert rope is not None
    assert (rope.angles < 0).all()  # these two rotate in the other direction


@pytest.mark.parametrize("family", ["llama", "internlm2", "internlm3"])
def test_a_rotation_that_changes_with_the_length_of_the_text_is_unknown(family):
    model = tiny(family, **DYNAMIC)
    assert [seen.rope for seen in capture_layers(model, IDS)] == [None, None]


def test_a_rotation_is_known_if_later_operations_commute_with_it():
    model = tiny("hunyuan_v1_dense", rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0})
    assert [seen.rope.dims for seen in capture_layers(model, IDS)] == [64, 64]
    norm = model.layers[1].self_attn.key_layernorm  # after the rotation: uneven weights do not commute with it
    norm.weight = mx.random.uniform(0.5, 2.0, norm.weight.shape, key=mx.random.key(0))
    assert [seen.rope is None for seen in capture_layers(model, IDS)] == [False, True]


def test_keys_that_do_not_change_have_no_rotary_embedding():
    model = tiny("llama")
    first = model.layers[0].self_attn
    first.k_proj.weight = mx.zeros_like(first.k_proj.weight)
    assert [seen.rope is None for seen in capture_layers(model, IDS)] == [True, False]


def test_many_tokens_that_share_memory_are_rotated_each_by_its_position():
    rope, mean = Rope(32), mx.random.normal((1, 2, 1, 32), key=mx.random.key(0))
    many = mx.broadcast_to(mean, (1, 2, 50, 32))
    turned, apart = rope.forward(many, 7), rope.forward(mx.concatenate([mean] * 50, axis=2), 7)
    assert mx.array_equal(turned, apart)
    assert mx.array_equal(many[:, :, 0], mean[:, :, 0])
