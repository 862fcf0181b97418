"""Small models of mlx-lm's own classes with random weights."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from tests import stand_ins
from tests.small_configs import ALTERNATING, Config, module_of, small_config

# one for each kind of attention: the tests run them all, and `tests.every_family` the rest
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "phi3",
    "phi",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n",
    "gemma4_text",
    "falcon_h1",
    "gpt_oss",
    "deepseek_v3",
    "glm4",
    "granite",
    "olmo2",
    "olmo3",
    "lfm2",
    "mamba2",
)


def config_of(family: str, **given: Any) -> Config:
    """Return a small configuration with ``given``; for Mistral as mlx-lm reads it, a Llama that can slide."""
    if family == "mistral":
        given = {"layer_types": ALTERNATING[1::-1]} | given
        return small_config("llama", given) | {"model_type": family}
    return small_config(family, given)


def tiny(family: str, seed: int = 0, **given: Any) -> Any:
    """Return a small model of mlx-lm's own class with random weights."""
    stand_ins.put_in(family)
    module, config = module_of("llama" if family == "mistral" else family), config_of(family, **given)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    if family == "phi3small":  # it writes at ids beyond a small vocabulary, which MLX does not check
        model._dummy_tokenizer_ids = mx.array([], mx.int32)
    mx.eval(model.parameters())
    return model


def stepwise(model: Any, ids: list[int], cache: list[Any], chunks: list[int]) -> np.ndarray:
    """Return logits of all ``ids``, fed in ``chunks``."""
    rows, start = [], 0
    for count in chunks:
        rows.append(np.array(model(mx.array([ids[start : start + count]]), cache=cache)[0].astype(mx.float32)))
        start += count
    return np.concatenate(rows)
