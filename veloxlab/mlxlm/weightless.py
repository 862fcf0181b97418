"""Models of mlx-lm from a configuration, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.errors import InputError


def weightless(config: Mapping[str, Any]) -> Module:
    """Return mlx-lm's own model for a ``config.json``. Its weights are lazy, and are computed only if they are read.

    Its dtype is float32 if the configuration names that, otherwise one of 16 bits. Raises `InputError` if mlx-lm cannot
    make the model.
    """
    try:
        from mlx_lm.utils import _get_classes  # private: without it, only this function fails

        kind, arguments = _get_classes(dict(config))
        model: Module = kind(arguments.from_dict(dict(config)))
    except Exception as error:  # each model reads its configuration with code of its own
        raise InputError(
            f"mlx-lm cannot make a model of this configuration (model_type {config.get('model_type')!r}: "
            f"{type(error).__name__}: {error}): give a model's config.json, or type the shape in."
        ) from error
    named = config.get("dtype") or config.get("torch_dtype")
    model.set_dtype(mx.float32 if named == "float32" else mx.bfloat16)
    return model
