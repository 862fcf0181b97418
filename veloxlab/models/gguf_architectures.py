"""Builds mlx-lm's model from a GGUF file: class, settings, and names of weights by architecture."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from textwrap import shorten
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from veloxlab.errors import InputError
from veloxlab.models.gguf import Gguf

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
NONE: Mapping[str, Any] = MappingProxyType({})


class Architecture(NamedTuple):
    """How llama.cpp's converter writes the weights and settings of one of mlx-lm's models."""

    module: str  # of mlx_lm.models
    names: Mapping[str, str] = NONE  # of modules with other names than in MODULES
    settings: Mapping[str, tuple[str, type, Any]] = NONE  # more of ModelArgs: key and type in the file, and default
    fixed: Mapping[str, Any] = NONE  # more of ModelArgs, with values that no file has
    neighbours: bool = False  # RoPE rotates neighbouring coordinates, not halves, so rows are reordered
    norm_plus: float = 0.0  # offset of the file's norm weights from mlx-lm's
    scaled: tuple[str, ...] = ("linear", "yarn", "llama3")  # kinds of RoPE scaling that the model supports
    large: int = 0  # layers of the model size whose attention scale uses width / heads, not head_dim


LLAMA = Architecture("llama", neighbours=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": Architecture("smollm3", neighbours=True),
    "granite": Architecture(
        "granite",
        settings={
            "attention_multiplier": ("attention.scale", float, None),
            "embedding_multiplier": ("embedding_scale", float, 1.0),
            "residual_multiplier": ("residual_scale", float, 1.0),
            "logits_scaling": ("logit_scale", float, 1.0),
        },
        neighbours=True,
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture(
        "qwen3_moe",
        names=EXPERTS,
        settings={
            "num_experts": ("expert_count", int, None),
            "num_experts_per_tok": ("expert_used_count", int, None),
            "moe_intermediate_size": ("expert_feed_forward_length", int, None),
        },
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
        scaled=(),
    ),
    "gemma2": Architecture(
        "gemma2",
        names={**AFTER, "ffn_norm": "pre_feedforward_layernorm"},
        settings={
            "attn_logit_softcapping": ("attn_logit_softcapping", float, 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", float, 30.0),
        },
        norm_plus=1.0,
        scaled=(),
        large=46,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        names={**AFTER, "ffn_norm": "pre_feedforward_layernorm"},
        settings={
            "sliding_window": ("attention.sliding_window", int, None),
            "sliding_window_pattern": ("attention.sliding_window_pattern", int, 6),
            "rope_local_base_freq": ("rope.freq_base_swa", float, 10000.0),
        },
        norm_plus=1.0,
        large=62,
    ),
    "phi3": Architecture(
        "phi3",
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        settings={"original_max_position_embeddings": ("rope.scaling.original_context_length", int, 4096)},
        scaled=("linear", "longrope"),
    ),
    "olmo2": Architecture("olmo2", names=AFTER),
}
CONVERTED = "load an mlx-lm conversion of this model instead."


def build_model(file: Gguf, dtype: mx.Dtype) -> nn.Module:
    """Build mlx-lm's model from a GGUF file, with weights decoded to ``dtype``; `InputError` if it cannot."""
    name = file.value("general.architecture", str)
    if name not in ARCHITECTURES:
        said = (
            f"{file.path} has the architecture {name!r}, which is not read from GGUF ({', '.join(ARCHITECTURES)} are)"
        )
        raise InputError(f"{said}; {CONVERTED}")
    architecture, settings = ARCHITECTURES[name], model_settings(file)
    names = MODULES | dict(architecture.names)
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}

    def weight(name: str) -> tuple[str, mx.array]:
        *block, module, kind = name.split(".")  # such as blk.3.attn_q.weight; unknown names pass
        if architecture.norm_plus and module.endswith("norm"):
            read = (file.read(name, mx.float32) - architecture.norm_plus).astype(dtype)
        else:
            read = file.read(name, dtype)
        if architecture.neighbours and module in heads:  # coordinates i and i + D/2 for mlx-lm: even rows come first
            read = read.reshape(heads[module], -1, 2, *read.shape[1:]).swapaxes(1, 2).reshape(read.shape)
        mx.eval(read)  # now, so that only one tensor is held twice
        prefix = f"model.layers.{block[1]}." if len(block) == 2 else ""
        return f"{prefix}{names.get(module, module)}.{kind}", read

    with ThreadPoolExecutor(1) as reader:
        weights = reader.map(weight, [name for name in file.tensors if name not in FACTORS])
        reader.submit(mx.clear_streams)  # otherwise MLX aborts a process that ends just after a thread with streams
        # here, so that weights are read during the import of mlx-lm, which takes two seconds
        module = import_module(f"mlx_lm.models.{architecture.module}")
        try:
            model: nn.Module = module.Model(module.ModelArgs.from_dict({"model_type": architecture.module, **settings}))
            loaded = dict(weights)
            model.load_weights(list((model.sanitize(loaded) if hasattr(model, "sanitize") else loaded).items()))
        except InputError:
            raise
        except (ValueError, TypeError, OverflowError, ArithmeticError) as error:
            said = f"The tensors of {file.path} are not those of a plain {name} model"
            raise InputError(f"{said} ({shorten(str(error), 160)}); {CONVERTED}") from error
    if FACTORS[0] in file.tensors:
        _stretch(model, settings["rope_theta"], file.read(FACTORS[0], mx.float32))
    model.eval()
    # the whole tree and not only its parameters: RoPE frequencies are not parameters, and another thread, such as
    # that of the notebook widgets, cannot evaluate an array that is still lazy
    mx.eval(model)
    return model


def _stretch(model: nn.Module, base: float, factors: mx.array) -> None:
    """Multiply each RoPE period by the file's own factor, which is more exact than the ``llama3`` settings."""
    periods = base ** (mx.arange(0, 2 * factors.size, 2, dtype=mx.float32) / (2 * factors.size)) * factors
    for layer in model.layers:
        if hasattr(layer.self_attn.rope, "_freqs"):  # SmolLM3 has layers without positions
            layer.self_attn.rope._freqs = periods


def model_settings(file: Gguf) -> dict[str, Any]:
    """Return the arguments of mlx-lm's ``ModelArgs`` from the metadata; `InputError` if tensors differ from them."""
    prefix = file.value("general.architecture", str)
    architecture = ARCHITECTURES[prefix]

    def number(key: str, otherwise: int | None = None) -> int:
        found = file.value(f"{prefix}.{key}", int, otherwise)
        if found < 1:
            raise InputError(f"{file.path} has {prefix}.{key} = {found}; convert the model to GGUF again.")
        return found

    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} holds no token embeddings (token_embd.weight); give the file of a whole model.")
    layers, width, heads = number("block_count"), number("embedding_length"), number("attention.head_count")
    blocks = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    embeddings = file.tensors["token_embd.weight"].shape
    if layers != blocks or embeddings[1:] != (width,):
        said = f"{file.path} says {layers} layers of width {width}, and holds {blocks} and embeddings {embeddings}"
        raise InputError(f"{said}; give the file of a whole model, in one part.")
    head_dim = number("attention.key_length", width // heads or 1)
    rotated = number("rope.dimension_count", head_dim)
    if rotated != head_dim and architecture.module != "phi3":
        said = f"{file.path} rotates {rotated} of {head_dim} coordinates of each head"
        raise InputError(f"{said}, which is not read from GGUF; {CONVERTED}")
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": number("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": file.value(f"{prefix}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": embeddings[0],
        "max_position_embeddings": number("context_length"),
        "rope_theta": file.value(f"{prefix}.rope.freq_base", float, 10000.0),
        "rope_scaling": _scaling(file, prefix),
        "partial_rotary_factor": rotated / head_dim,
        "query_pre_attn_scalar": width // heads if layers == architecture.large else head_dim,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **architecture.fixed,
        **{
            setting: file.value(f"{prefix}.{key}", kind, otherwise)
            for setting, (key, kind, otherwise) in architecture.settings.items()
        },
    }


def _scaling(file: Gguf, prefix: str) -> dict[str, Any] | None:
    """Return the rope_scaling of a model's configuration, from llama.cpp's keys or its tensors of factors."""
    key = f"{prefix}.rope.scaling."
    kind = file.value(f"{key}type", str, "none")
    scaling: dict[str, Any] = {"factor": file.value(f"{key}factor", float, 1.0)}
    if FACTORS[0] in file.tensors:
        kind, scaling = "llama3", {"factor": file.read(FACTORS[0], mx.float32).max().item()}
    elif FACTORS[1] in file.tensors:
        long, short = (file.read(name, mx.float32).tolist() for name in FACTORS[1:])
        kind, scaling = "longrope", {"long_factor": long, "short_factor": short}
    elif kind == "yarn":
        scaling["original_max_position_embeddings"] = file.value(f"{key}original_context_length", int)
        for name in ("beta_fast", "beta_slow"):
            if f"{key}yarn_{name}" in file.metadata:
                scaling[name] = file.value(f"{key}yarn_{name}", float)
    if kind == "none" or (kind == "longrope" and "long_factor" not in scaling):  # no factors for long texts
        return None
    if kind not in ARCHITECTURES[prefix].scaled:
        raise InputError(
            f"{file.path} scales its rotary positions ({kind!r}), which mlx-lm's {prefix} model does not; {CONVERTED}"
        )
    return {"type": kind, **scaling}
