"""A model of mlx-lm that is known by its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.errors import InputError


def weightless(config: Mapping[str, Any]) -> Module:
    """A model of mlx-lm's own class for a ``config.json``, whose weights are never made as long as none is read.

    It computes in float32 where the configuration says so, and else in 16 bits. Raises `InputError` if mlx-lm makes no
    model of it.
    """
    try:
        from mlx_lm.utils import _get_classes  # private: an mlx-lm without it does all but this

        kind, arguments = _get_classes(dict(config))
        model: Module = kind(arguments.from_dict(dict(config)))
    except Exception as error:  # every model reads its configuration in its own way
        raise InputError(
            f"mlx-lm makes no model of this configuration (model_type {config.get('model_type')!r}: "
            f"{type(error).__name__}: {error}): give a model's config.json, or type the shape in."
        ) from error
    named = config.get("dtype") or config.get("torch_dtype")
    model.set_dtype(mx.float32 if named == "float32" else mx.bfloat16)
    return model
