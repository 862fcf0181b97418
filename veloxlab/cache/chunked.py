"""The compressed cache of a layer that sees its text in chunks, as three of four layers of Llama 4 do."""

from __future__ import annotations

from typing import NoReturn

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

    @property
    def merge(self) -> NoReturn:
        """Llama 4 computes with one position for all: by this mlx-lm's server knows that it runs no batches of it."""
        raise AttributeError(f"{type(self).__name__} has no batches, as the model's own cache has none.")
