"""GGUF files as mlx-lm's models: for each architecture, a file of llama.cpp's converter has mlx-lm's logits."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest
from gguf import RopeScalingType
from mlx.utils import tree_flatten, tree_map

from tests.gguf_files import HEAD_DIM, as_llama_cpp, tiny_tensors, write_gguf, write_llama
from veloxlab.errors import InputError
from veloxlab.models.gguf import open_gguf
from veloxlab.models.gguf_architectures import ARCHITECTURES, build_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 48,
    "max_position_embeddings": 512,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
}
WRITTEN = {  # by methods of the package's writer that llama.cpp's converter calls
    "add_embedding_length": 32,
    "add_block_count": 2,
    "add_feed_forward_length": 40,
    "add_head_count": 4,
    "add_head_count_kv": 2,
    "add_layer_norm_rms_eps": 1e-5,
    "add_context_length": 512,
    "add_rope_freq_base": 500.0,
}
WIDE = {"add_key_length": 16, "add_value_length": 16}  # heads wider than the model
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
WRITTEN_YARN = {
    "add_rope_scaling_type": RopeScalingType.YARN,
    "add_rope_scaling_factor": 4.0,
    "add_rope_scaling_orig_ctx_len": 32,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
WRITTEN_LINEAR = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 8.0}
LONG = {"type": "longrope", "long_factor": [1.0, 2.0, 5.0, 9.0], "short_factor": [1.0, 1.0, 1.5, 2.0]}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
CASES: dict[
    str, tuple[str, dict, dict]
] = {  # architecture, more of mlx-lm's ModelArgs than SIZES, more of the file than WRITTEN
    "llama": ("llama", {}, {"add_rope_dimension_count": 8}),
    "llama, not tied": ("llama", {"tie_word_embeddings": False, "head_dim": 16}, WIDE),
    "llama with biases": ("llama", {"attention_bias": True}, {}),
    "Llama 3.1": ("llama", {"rope_scaling": LLAMA3}, {}),
    "mistral": ("mistral", {"head_dim": 16}, WIDE),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, YaRN": ("qwen2", {"rope_scaling": YARN}, WRITTEN_YARN),
    "qwen3": ("qwen3", {"head_dim": 16}, WIDE),
    "qwen3moe": (
        "qwen3moe",
        {"head_dim": 16, "mlp_only_layers": [], "norm_topk_prob": True, **MOE},
        {**WIDE, "add_expert_count": 4, "add_expert_used_count": 2, "add_expert_feed_forward_length": 24},
    ),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}, {**WIDE, "add_attn_logit_softcapping": 5.0}),
    "gemma3": (
        "gemma3",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": 6, "rope_scaling": LINEAR},
        {**WIDE, "add_block_count": 7, "add_sliding_window": 6, **WRITTEN_LINEAR},
    ),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5}, {"add_rope_dimension_count": 4, "add_sliding_window": 0}),
    "phi3, long": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 64, "tie_word_embeddings": False},
        {"add_rope_scaling_orig_ctx_len": 64, "add_rope_scaling_attn_factors": 1.2},
    ),
    "granite": (
        "granite",
        {
            **{"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
            **{"residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False},
        },
        {"add_logit_scale": 3.0, "add_attention_scale": 0.2, "add_embedding_scale": 2.0, "add_residual_scale": 0.5},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}, {"add_block_count": 4}),
    "olmo2": ("olmo2", {"rope_scaling": YARN}, WRITTEN_YARN),
}
PERMUTED = ("llama", "mistral", "granite", "smollm3")  # by the converter's class of llama, which they share
NORM_PLUS = {"gemma2": 1.0, "gemma3": 1.0}


def original(architecture, settings):
    """Return a model of mlx-lm's with random weights, also in norms, as llama.cpp would convert it."""
    module = import_module(f"mlx_lm.models.{ARCHITECTURES[architecture].module}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": architecture, **SIZES, **settings}))
    mx.random.seed(len(settings))
    if architecture == "gemma3":
        model.sanitize({})  # ties the head if the weights have none
    model.update(tree_map(lambda weight: weight + 0.3 * mx.random.normal(weight.shape), model.parameters()))
    return model


def converted(path, model, architecture, written):
    """Write the file of llama.cpp's converter for a model."""
    named = "llama" if architecture == "mistral" else architecture  # the package has no own name for it
    permuted, norm_plus = architecture in PERMUTED, NORM_PLUS.get(architecture, 0.0)
    tensors = as_llama_cpp(model, named, permuted=permuted, norm_plus=norm_plus)
    scaling = getattr(model.args, "rope_scaling", None) or {}
    if scaling is LLAMA3:
        periods = 500.0 ** (np.arange(0, 8, 2, dtype=np.float32) / 8)
        tensors["rope_freqs.weight"] = np.array(model.layers[0].self_attn.rope._freqs) / periods
    if scaling is LONG:
        for length in ("long", "short"):
            tensors[f"rope_factors_{length}.weight"] = np.array(scaling[f"{length}_factor"], np.float32)
    return open_gguf(write_gguf(path, architecture, tensors, WRITTEN | written))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_converted_model(tmp_path, case):
    architecture, settings, written = CASES[case]
    model = original(architecture, settings)
    read = build_model(converted(tmp_path / "x.gguf", model, architecture, written), mx.float32)
    assert type(read) is type(model)
    tokens = mx.random.randint(0, SIZES["vocab_size"], (2, 17), key=mx.random.key(1))
    expected = model(tokens)
    assert mx.allclose(read(tokens), expected, rtol=1e-4, atol=1e-4 * mx.abs(expected).max())
    read.update(tree_map(lambda weight: weight + 0.01, read.parameters()))
    assert not mx.allclose(read(tokens), expected, rtol=1e-2, atol=1e-2)  # so this test can fail


@pytest.mark.parametrize("case", ["Llama 3.1", "qwen2, YaRN", "gemma3", "phi3, long", "phi3"])
def test_scaled_positions_change_the_logits(tmp_path, case):
    """The tests above would give other logits without the file's settings of positions."""
    architecture, settings, _ = CASES[case]
    plain = {key: value for key, value in settings.items() if key not in ("rope_scaling", "partial_rotary_factor")}
    tokens = mx.random.randint(0, SIZES["vocab_size"], (2, 17), key=mx.random.key(1))
    scaled, other = original(architecture, settings), original(architecture, plain)
    other.update(scaled.parameters())
    assert not mx.allclose(scaled(tokens), other(tokens), rtol=1e-2, atol=1e-2)


def test_the_largest_gemmas_scale_attention_by_width_over_heads(tmp_path):
    settings = {**GEMMA, "num_hidden_layers": 46, "query_pre_attn_scalar": 32 // 4, "intermediate_size": 4}
    model = original("gemma2", settings)
    written = {**WIDE, "add_block_count": 46, "add_feed_forward_length": 4}
    read = build_model(converted(tmp_path / "x.gguf", model, "gemma2", written), mx.float32)
    assert read.layers[0].self_attn.scale == model.layers[0].self_attn.scale


@pytest.mark.parametrize("tied", [True, False])
def test_output_head_is_tied_only_without_its_own_tensor(tmp_path, tied):
    model = build_model(open_gguf(write_llama(tmp_path / "tiny.gguf", tiny_tensors(tied))), mx.float32)
    assert model.args.tie_word_embeddings is tied
    assert ("lm_head" in model) is not tied


def test_weights_have_the_requested_type(tmp_path):
    model = build_model(open_gguf(write_llama(tmp_path / "tiny.gguf")), mx.bfloat16)
    assert {weight.dtype for weight in tree_flatten(model.parameters(), destination={}).values()} == {mx.bfloat16}


# models that are refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "gptj"},
            r"has the architecture 'gptj', which is not read from GGUF \(llama, mistral, .*olmo2 ",
        ),
        (
            {"llama.rope.scaling.type": "su"},
            r"scales its rotary positions \('su'\), which mlx-lm's llama model does not",
        ),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 coordinates of each head"),
        ({"llama.block_count": "two"}, "has no metadata value llama.block_count of the type int"),
        ({"llama.block_count": None}, "has no metadata value llama.block_count of the type int"),
        ({"llama.block_count": 2**30}, "says 1073741824 layers of width 24, and holds 2 and embeddings"),
        ({"llama.embedding_length": 25}, "says 2 layers of width 25, and holds 2 and embeddings"),
        ({"llama.attention.head_count": 0}, r"has llama\.attention\.head_count = 0"),
        ({"llama.attention.head_count": 3}, "not those of a plain llama model"),
        ({"llama.attention.head_count_kv": 2**31 - 1}, "not those of a plain llama model"),
        (
            {"llama.attention.key_length": 2**31 - 2, "llama.rope.dimension_count": 2**31 - 2},
            "not those of a plain llama",
        ),
        ({"llama.feed_forward_length": 2**31 - 1}, "not those of a plain llama model"),
    ],
)
def test_a_model_that_mlx_lm_cannot_represent_is_refused(tmp_path, change, message):
    file = open_gguf(write_llama(tmp_path / "tiny.gguf", **change))
    with pytest.raises(InputError, match=message):
        build_model(file, mx.float32)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.1.attn_q.lora.weight"])
def test_extra_tensors_are_refused(tmp_path, name):
    tensors = tiny_tensors() | {name: mx.ones(HEAD_DIM)}
    with pytest.raises(InputError, match=r"not those of a plain llama model .*1 parameters not in model"):
        build_model(open_gguf(write_llama(tmp_path / "tiny.gguf", tensors)), mx.float32)


def test_a_part_of_a_model_is_refused(tmp_path):
    tensors = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith("token_embd")}
    with pytest.raises(InputError, match="holds no token embeddings"):
        build_model(open_gguf(write_llama(tmp_path / "tiny.gguf", tensors)), mx.float32)
