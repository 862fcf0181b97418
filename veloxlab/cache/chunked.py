"""The compressed cache of a layer with chunked attention, as three of four layers of Llama 4 have."""

from __future__ import annotations

from typing import Literal, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import create_attention_mask

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.mlxlm.hooks import loadable


@loadable
class ChunkedCompressedKVCache(CompressedKVCache):
    """A drop-in for mlx-lm's ``ChunkedKVCache``. The model makes the mask of the chunks from `start_position`."""

    @property
    def start_position(self) -> int:
        """Position of the oldest token that the next one will see."""
        return self.offset - self.visible

    def maybe_trim_front(self) -> None:
        """Do nothing: this cache drops tokens that no query can see when others come."""

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | Literal["causal"] | None:
        """The mask of a layer that sees all tokens: mlx-vlm's Llama 4 asks the first layer's cache for it."""
        mask: mx.array | Literal["causal"] | None = create_attention_mask(N, self.offset, return_array, window_size)
        return mask

    @property
    def merge(self) -> NoReturn:
        """Raise AttributeError, which tells mlx-lm's server not to use batches."""
        raise AttributeError("Llama 4 computes with one position for all sequences: its caches have no batches.")
