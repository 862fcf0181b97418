"""A small configuration of any family of mlx-lm, made from the fields of its own dataclass of arguments.

Sizes are made small by their names. A field without a default gets a value by its name or its type. `OWN` has the rest
that a family needs, such as a list with an entry for each layer.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

Config = dict[str, Any]

WINDOW = 24  # tokens that a sliding layer sees
ALTERNATING = ["sliding_attention", "full_attention"] * 2
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 128

# of any family that has a field of that name, whatever its default
SIZES: Config = {
    **dict.fromkeys(("hidden_size", "hidden_dim", "d_model", "model_dim", "n_embd", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"), KV_HEADS),
    **dict.fromkeys(("intermediate_size", "dense_intermediate_size", "ffn_hidden_size", "n_inner"), INNER),
    **dict.fromkeys(("ff_intermediate_size", "mlp_hidden_size", "shared_intermediate_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("shared_expert_intermediate_size", "share_expert_dim", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "hidden_size_per_head"), 64),
    **dict.fromkeys(("vocab_size", "num_vocab", "embedding_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length", "block_size"), 512),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "swa_v_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "index_head_dim"), 32),
    **dict.fromkeys(("a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim", "decay_low_rank_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads", "mamba_n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("hidden_size_per_layer_input", "time_step_rank"), 8),
}
# of a field that has no default
REQUIRED: Config = {
    **dict.fromkeys(("rope_theta", "swa_rope_theta", "rope_local_base_freq", "rotary_emb_base"), 1e4),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), 0.5),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv", "conv1d_width"), 4),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "use_qk_norm", "qk_norm"), True),
    **dict.fromkeys(("mla_scale_q_lora", "mla_scale_kv_lora"), True),
    "conv_L_cache": 3,
    "ssm_state_size": 16,
    "layer_types": ALTERNATING[:LAYERS],
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "zero_expert_type": "identity",
    "topk_method": "noaux_tc",
    "mlp_only_layers": [],
    "final_logit_softcapping": 30.0,
    "logits_soft_cap": 30.0,
    "attention_multiplier": 0.125,
    "layer_group_size": 2,
}
BY_TYPE: Config = {"bool": False, "float": 1.0, "int": 2}
# the family of the language model, where that of a wrapper has no class of arguments for it
TEXT_FAMILIES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "prism_hadamard_qwen35": "qwen3_5",
    "qwen2_vl": "qwen2",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
TEXT_CLASSES = ("TextArgs", "TextConfig", "TextModelArgs")
KDA = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 2, "head_dim": 16, "short_conv_kernel_size": 4}
LLAMA4_ROPE = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPE_OF_TYPES = {name: {"rope_theta": theta} for name, theta in zip(ALTERNATING[:2], (1e4, 1e6), strict=True)}
# more fields of these families: lists with an entry for each layer, nested settings, and numbers that must fit
OWN: dict[str, Config] = {
    "afm7": {"num_layers": 4, "num_kv_reuse_layers": 2},
    "baichuan_m1": {"sliding_window_layers": [0], "head_dim": 16},
    "bailing_moe": {"rotary_dim": 8},
    "bailing_moe_v3": {"layer_group_size": 2},
    "bitnet": {"head_dim": 16},
    "cohere2": {"hidden_size": 256, "num_hidden_layers": 4},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "deepseek_v3": {"n_group": 2},
    "deepseek_v32": {"index_topk": 8},
    "deepseek_v41": {
        "num_hidden_layers": 3,
        "compress_ratios": (0, 4, 4),
        "kv_source_layer_ids": (1,),
        "index_source_layer_ids": (1,),
        "index_topk": 8,
        "rms_norm_eps": 1e-6,
    },
    "exaone": {"head_dim": 16},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8},
    "gear": {
        "num_hidden_layers": 3,
        "layer_types": [*ALTERNATING[:2], "conv_mixer"],
        "attn_logit_softcapping": 30.0,
    },
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {"num_hidden_layers": 3, "sliding_window_pattern": 3, "query_pre_attn_scalar": 64},
    "gemma3n": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ALTERNATING,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 1,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "global_head_dim": 128,
        "layer_types": ALTERNATING + ALTERNATING[:2],
    },
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "index_topk": 8},
    "gpt_oss": {"num_hidden_layers": 4, "rope_theta": 1e4, "layer_types": ALTERNATING},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    },
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}, "cla_share_factor": 2},
    "jamba": {"layers_block_type": ["mamba", "attention"], "expert_layer_offset": 1},
    "kimi_k3": {
        "linear_attn_config": KDA,
        "attn_res_block_size": 2,
        "routed_expert_hidden_size": 32,
    },
    "kimi_linear": {"linear_attn_config": KDA},
    "laguna": {"layer_types": ALTERNATING[:2], "rope_parameters": ROPE_OF_TYPES},
    "lfm2": {
        "num_hidden_layers": 4,
        "full_attn_idxs": [0, 2],
        "rope_theta": 1e4,
        "block_dim": 64,
        "block_ffn_dim_multiplier": 1.5,
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 32,
        "conv_bias": True,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"num_hidden_layers": 4, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW},
    "llama4_text": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "hidden_size": 128,
        "state_size": 32,
        "conv_kernel": 3,
        "n_groups": 4,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
    },
    "mellum": {"rope_parameters": ROPE_OF_TYPES},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm3": {"rope_scaling": {"original_max_position_embeddings": 512, "short_factor": 1.0, "long_factor": 1.0}},
    "minimax_m3_vl": {
        "index_block_size": 4,
        "index_topk_blocks": 3,
        "sparse_attention_freq": [0, 1],
        "moe_layer_freq": [0, 1],
    },
    "ministral3": {"rope_parameters": LLAMA4_ROPE, "layer_types": ALTERNATING[:2]},
    "mistral4": {"rope_parameters": {"type": "default", **LLAMA4_ROPE}},
    "muse_glimmer": {"layer_types": ALTERNATING[:2]},
    "muse_spark": {"num_shared_experts": 0, "rope_parameters": {"rope_theta": 1e4}, "layer_rope_theta": [1e4, 0.0]},
    "nanbeige": {"num_loops": 2},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"replace_with_linear": True}},
        ],
        "num_hidden_layers": 3,
    },
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"], "n_groups": 1, "routed_scaling_factor": 1.0},
    "olmo3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "openelm": {"num_query_heads": [4, 4], "num_kv_heads": [2, 1], "ffn_multipliers": [1.0, 2.0]},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "phixtral": {"rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo3": {"sliding_window_pattern": 2},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [{"path": "model.layers.0.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 0}],
    },
    "qwen": {"kv_channels": 16},
    "qwen3": {"rope_theta": 1e4},
    "qwen3_5": {"full_attention_interval": 2, "num_experts": 0},
    "qwen3_5_moe": {"num_experts": 4},
    "qwen3_moe": {"tie_word_embeddings": False},
    "qwen3_next": {
        "num_hidden_layers": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "decoder_sparse_step": 2,
        "partial_rotary_factor": 0.25,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "spark2_5": {"layer_types": ALTERNATING[:2], "rope_parameters": ROPE_OF_TYPES},
    "step3p5": {"layer_types": ALTERNATING[:2]},
}


def module_of(family: str) -> Any:
    """Return the module of mlx-lm for a family."""
    return import_module(f"mlx_lm.models.{family}")


def small_config(family: str, given: Config) -> Config:
    """Return a configuration for ``family``, with ``given`` also for a language model in it."""
    kind, first = module_of(family).ModelArgs, OWN.get(family, {}) | given
    config = {"model_type": family, **small_fields(kind, first)}
    if any(field.name == "text_config" for field in dataclasses.fields(kind)):
        name, kind = _text_of(family)
        config["text_config"] = {"model_type": name, **small_fields(kind, OWN.get(name, {}) | first)}
    return config


def _text_of(family: str) -> tuple[str, Any]:
    """Return the family of a wrapper's language model, and the class of its arguments."""
    module, named = module_of(family), TEXT_FAMILIES.get(family)
    for name in TEXT_CLASSES:
        if named is None and hasattr(module, name):
            return family, getattr(module, name)
    assert named is not None, f"no arguments of a language model are known for {family}"
    return _text_of(named) if hasattr(module_of(named), "TextModelArgs") else (named, module_of(named).ModelArgs)


def small_fields(kind: Any, given: Config) -> Config:
    """Return values for the fields of a dataclass: ``given``, small sizes, and fields without a default."""
    made: Config = {}
    for field in dataclasses.fields(kind):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in given:
            made[field.name] = given[field.name]
        elif field.name in SIZES:
            made[field.name] = SIZES[field.name]
        elif needed and field.name != "model_type":
            made[field.name] = _needed(field.name, field.type)
    return made


def _needed(name: str, kind: object) -> object:
    if name in REQUIRED:
        return REQUIRED[name]
    return 1e-5 if "eps" in name else BY_TYPE.get(getattr(kind, "__name__", ""))
