"""Shapes for timing: of layers, and of known models with random weights, which take the time of the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs

from veloxlab.errors import InputError


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dimension of a layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """The factor of q·k in attention."""
        return float(self.head_dim**-0.5)


SHAPES = (Shape(32, 8, 128), Shape(16, 2, 128), Shape(8, 1, 256))
_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(zip(_FIELDS, (576, 30, 1536, 9, 3), strict=True)) | {"rope_theta": 1e5},
    "one layer of 7B": dict(zip(_FIELDS, (4096, 1, 14336, 32, 8), strict=True)) | {"rope_theta": 1e6},  # of Mistral's
}
"""Shapes of models that can be measured without their weights."""


def random_model(shape: str, dtype: mx.Dtype = mx.float16, **changes: Any) -> Model:
    """Return a model of `MODELS` with ``changes``, random weights of type ``dtype`` and a small vocabulary."""
    if shape not in MODELS:
        raise InputError(f"No shape of {shape!r} is known: choose one of {', '.join(map(repr, MODELS))}.")
    usual = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 96}
    model = Model(ModelArgs(**{**usual, **MODELS[shape], **changes}))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model
