"""Small models of mlx-lm's own classes with random weights: one for each family that attends in its own way."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "head_dim": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": []}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
WINDOW = 24  # tokens that a sliding layer sees

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model": "llama", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": True},
    "qwen3_moe": {
        **EXPERTS,
        "decoder_sparse_step": 1,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 2,
        "shared_expert_intermediate_size": 64,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": 512,
    },
    "phi3": {},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 64},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 64,
    },
    "gemma3n": {
        "text_config": {
            **COMMON,
            "model_type": "gemma3n",
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 96,
            "sliding_window": WINDOW,
            "max_position_embeddings": 128,
            "rope_local_base_freq": 1e4,
            "rope_theta": 1e4,
            "final_logit_softcapping": 30.0,
            "layer_types": ALTERNATING,
            "activation_sparsity_pattern": [0.0] * 4,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 1,
            "altup_coef_clip": 1.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 4,
        }
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "global_head_dim": 128,
        "sliding_window": WINDOW,
        "layer_types": ALTERNATING + ALTERNATING[:2],
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "gpt_oss": {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "rope_theta": 1e4,
        "layer_types": ALTERNATING,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 16,
        "qk_nope_head_dim": 32,
    },
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.5, "rope_theta": 1e4},
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.125,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 1e4,
    },
    "olmo2": {"attention_bias": False, "rope_theta": 1e4},
    "olmo3": {
        "num_hidden_layers": 4,
        "rope_theta": 1e4,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
    "lfm2": {
        "num_hidden_layers": 4,
        "norm_eps": 1e-5,
        "full_attn_idxs": [0, 2],
        "rope_theta": 1e4,
        "block_dim": 64,
        "block_ffn_dim_multiplier": 1.5,
        "block_auto_adjust_ff_dim": True,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "max_position_embeddings": 512,
        "conv_bias": True,
        "conv_L_cache": 3,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "hidden_size": 128,
        "state_size": 32,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 3,
        "n_groups": 4,
        "use_bias": False,
        "use_conv_bias": False,
        "tie_word_embeddings": True,
        "time_step_limit": (0.01, 10),
        "time_step_rank": "auto",
    },
}


def tiny(family: str, seed: int = 0, **config: Any) -> Any:
    """A small model of mlx-lm's own class with random weights."""
    known = {"model_type": family, **COMMON, **FAMILIES.get(family, {}), **config}
    module = __import__(f"mlx_lm.models.{known.pop('model', family)}", fromlist=["Model"])
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(known))
    mx.eval(model.parameters())
    return model


def stepwise(model: Any, ids: list[int], cache: list[Any], chunks: list[int]) -> np.ndarray:
    """Logits of all ``ids``, fed in ``chunks``."""
    rows, start = [], 0
    for count in chunks:
        rows.append(np.array(model(mx.array([ids[start : start + count]]), cache=cache)[0].astype(mx.float32)))
        start += count
    return np.concatenate(rows)
