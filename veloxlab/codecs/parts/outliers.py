"""Outlier channels: two codecs share a vector, one for the channels of most energy and one for the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Self

import mlx.core as mx
import numpy as np

from veloxlab.codecs.base import Code, RotatedCodec, Sample, TiledCodec, check_vectors
from veloxlab.errors import InputError

_LEAST_CHANNELS = 4  # of either part: the least dimension of a rotated codebook
_OUTLIER = "outlier_"  # how the names of their arrays begin


class SplitCodec(TiledCodec):
    """Two rotated codecs side by side. A subclass is a dataclass with these fields, and says which codecs.

    Attributes
    ----------
    outliers : k, how many channels stand out.
    channels : their indices, k for each KV head in turn; empty before `fit`.
    """

    head_dim: int
    outliers: int
    channels: tuple[int, ...]

    @property
    @abstractmethod
    def parts(self) -> tuple[RotatedCodec, RotatedCodec]:
        """The codecs of the outliers and of the rest."""

    def __post_init__(self) -> None:
        most = self.head_dim - _LEAST_CHANNELS
        if not _LEAST_CHANNELS <= self.outliers <= most:
            raise InputError(
                f"outliers={self.outliers!r} of {self.head_dim} channels do not leave two parts: choose "
                f"{_LEAST_CHANNELS} to {most}."
            )
        _ = self.parts

    @property
    def bits_per_value(self) -> float:
        """Bits of both parts, each with its own scale."""
        return sum(part.bits_per_value * part.head_dim for part in self.parts) / self.head_dim

    @property
    def shared_bytes(self) -> int:
        """Tables of both parts, and the order of the channels."""
        kv_heads = len(self.channels) // self.outliers
        return sum(part.shared_bytes for part in self.parts) + 2 * 4 * kv_heads * self.head_dim

    def fit(self, sample: Sample) -> Self:
        """Find the channels with the largest mean square, for each KV head."""
        check_vectors(sample.x, self.head_dim)
        energy = np.array(mx.square(sample.x.astype(mx.float32)).sum(axis=(0, 2)))
        if not energy.any(axis=-1).all():
            raise InputError(
                "The sample has no token, or only zeros in a KV head, so that no channel stands out: calibrate with at "
                "least one token that is not zero."
            )
        found = np.sort(np.argsort(-energy, axis=-1, kind="stable")[:, : self.outliers], axis=-1)
        return replace(self, channels=tuple(found.ravel().tolist()))  # type: ignore[type-var]

    def encode(self, x: mx.array, start: int = 0) -> Code:
        """Compress ``x`` ``[B, H, S, D]``; see `Codec.encode`."""
        check_vectors(x, self.head_dim)
        outliers, rest = self._split(_reordered(x, self._order(x.shape[1])[0]))
        arrays = {_OUTLIER + name: a for name, a in self.parts[0].encode(outliers).arrays.items()}
        return Code(arrays | self.parts[1].encode(rest).arrays, start)

    def expand(self, code: Code) -> mx.array:
        """Both parts, rotated and scaled; see `TiledCodec.expand`."""
        outliers = {n.removeprefix(_OUTLIER): a for n, a in code.arrays.items() if n.startswith(_OUTLIER)}
        codes = Code(outliers), Code({name: code.arrays[name] for name in outliers})
        expanded = [part.expand(c) * part.scales(c) for part, c in zip(self.parts, codes, strict=True)]
        return mx.concatenate(expanded, axis=-1)

    def from_codes(self, y: mx.array) -> mx.array:
        """Rotate both parts back, and put the channels in their places."""
        back = [part.from_codes(half) for part, half in zip(self.parts, self._split(y), strict=True)]
        return _reordered(mx.concatenate(back, axis=-1), self._order(y.shape[1])[1])

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Bring the outliers to the front, and rotate both parts."""
        halves = self._split(_reordered(q, self._order(q.shape[1])[0]))
        ours = [part.query_to_codes(half) for part, half in zip(self.parts, halves, strict=True)]
        return mx.concatenate(ours, axis=-1)

    def _split(self, x: mx.array) -> tuple[mx.array, mx.array]:
        return x[..., : self.outliers], x[..., self.outliers :]

    def _order(self, kv_heads: int) -> tuple[mx.array, mx.array]:
        """Channels in the order of the codes, and its inverse: each ``[1, H, 1, D]``."""
        known = len(self.channels) // self.outliers
        if not known:
            raise InputError(
                "A codec with outlier channels has to see activations before it can encode: fit it with "
                f"vl.calibrate(model, tokenizer, method, outliers={self.outliers})."
            )
        if known != kv_heads:
            raise InputError(
                f"This codec was fitted to {known} KV heads and was given {kv_heads}: fit it to this layer."
            )
        return self._orders

    @cached_property
    def _orders(self) -> tuple[mx.array, mx.array]:
        """See `_order`: asked for at every token, and each layer has its own."""
        heads = np.array(self.channels).reshape(-1, self.outliers)
        order = np.stack([np.concatenate([head, np.setdiff1d(np.arange(self.head_dim), head)]) for head in heads])
        there, back = (mx.array(a[None, :, None].astype(np.uint32)) for a in (order, np.argsort(order, axis=-1)))
        mx.eval(there, back)
        return there, back


def _reordered(x: mx.array, order: mx.array) -> mx.array:
    return mx.take_along_axis(x, mx.broadcast_to(order, x.shape), axis=-1)
