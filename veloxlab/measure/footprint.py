"""Memory that the predictions of a stretch of text take, known before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.errors import InputError

_FLOAT32 = 4
_AT_ONCE = 3  # logits, as the model gives them and in float32, and the log-probabilities that are compared


def predicted_bytes(model: Module, lengths: Sequence[int]) -> int:
    """Bytes at least for a model's log-probabilities over stretches of ``lengths``, and another run's of the last.

    On a CPU MLX makes the scores of a layer's heads, length times length, too. Nothing is computed.
    """
    vocabulary: int = model(mx.array([[0]])).shape[-1]  # builds a graph only
    longest = max(lengths)
    heads: int = getattr(getattr(model, "args", None), "num_attention_heads", 0) if runtime.backend() == "cpu" else 0
    kept = vocabulary * sum(lengths)
    return _FLOAT32 * (kept + max(_AT_ONCE * vocabulary * longest, heads * longest**2))


def check_room(model: Module, lengths: Sequence[int]) -> None:
    """Refuse stretches of text of these ``lengths`` whose predictions do not fit into memory.

    Raises
    ------
    InputError : with the bytes that they take, and those that there are beside what MLX holds already.
    """
    needed = predicted_bytes(model, lengths)
    free = runtime.device().memory_bytes - mx.get_active_memory()
    if needed > free:
        tokens = f"{len(lengths)} stretch{'es' * (len(lengths) > 1)} of up to {max(lengths):,} tokens"
        raise InputError(
            f"The predictions of {tokens} take {needed:,} bytes at least, and {max(0, free):,} are left here: take "
            "fewer or shorter ones."
        )
