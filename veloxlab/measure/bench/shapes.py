"""Models in the shapes of known ones, with random weights: they take the time that those take."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs

from veloxlab.errors import InputError

_FIELDS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(zip(_FIELDS, (576, 30, 1536, 9, 3), strict=True)) | {"rope_theta": 1e5},
    "one layer of 7B": dict(zip(_FIELDS, (4096, 1, 14336, 32, 8), strict=True)) | {"rope_theta": 1e6},  # of Mistral's
}
"""Shapes of models that can be measured without their weights."""


def random_model(shape: str, dtype: mx.Dtype = mx.float16, **changes: Any) -> Model:
    """A model of one of `SHAPES`, but for ``changes``, with random weights of type ``dtype`` and a small vocabulary."""
    if shape not in SHAPES:
        raise InputError(f"No shape of {shape!r} is known: choose one of {', '.join(map(repr, SHAPES))}.")
    usual = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 96}
    model = Model(ModelArgs(**{**usual, **SHAPES[shape], **changes}))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model
