"""The compressed cache of a layer that sees its text in chunks, as three of four layers of Llama 4 do."""

from __future__ import annotations

from typing import Literal, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.mlxlm.hooks import loadable


@loadable
class ChunkedCompressedKVCache(CompressedKVCache):
    """A drop-in for mlx-lm's ``ChunkedKVCache``: the mask of the chunks is the model's, made of what is said here."""

    @property
    def start_position(self) -> int:
        """Position of the oldest token that the next one will see."""
        return self.offset - self.visible

    def maybe_trim_front(self) -> None:
        """Nothing, where mlx-lm's own forgets: what no token will see is let go as others come."""

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | Literal["causal"] | None:
        """For ``N`` tokens in layers that see all, as of a cache that makes none: mlx-vlm's Llama 4 asks the first."""
        mask: mx.array | Literal["causal"] | None = create_attention_mask(N, self.offset, return_array, window_size)
        return mask

    @property
    def merge(self) -> NoReturn:
        """Raises AttributeError, by which mlx-lm's server knows that it runs no batches."""
        raise AttributeError("Llama 4 computes with one position for all sequences: its caches have no batches.")
