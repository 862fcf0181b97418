"""Outlier channels: one codec for the channels of a vector with most energy, and one for the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import ClassVar, Self

import mlx.core as mx
import numpy as np

from veloxlab.checks import whole
from veloxlab.codecs.base import Code, Codec, Sample, check_heads, check_vectors, not_fitted
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.learning import learnable
from veloxlab.codecs.parts.packing import Layout
from veloxlab.codecs.parts.rope import Start
from veloxlab.errors import InputError

_OUTLIER = "outlier_"  # prefix of their arrays


class SplitCodec(Codec):
    """Two codecs that share a vector. A subclass is a frozen dataclass with these fields, and defines `parts`.

    ``channels`` are the indices of the outliers, k = ``outliers`` for each KV head in turn; empty before `fit`.
    """

    expand_scales: ClassVar[bool] = True
    method: ClassVar[str]
    head_dim: int
    bits: int
    outliers: int
    channels: tuple[int, ...]

    @property
    @abstractmethod
    def counts(self) -> range:
        """The possible numbers of outliers."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Codec, Codec]:
        """Codecs of the outliers, and of the other ``D − k`` channels, or of all ``D`` with zeros in their places."""

    def __post_init__(self) -> None:
        # files of version 0.1 hold those of QJL as an array
        channels = self.channels.reshape(-1).tolist() if isinstance(self.channels, mx.array) else self.channels or ()
        object.__setattr__(self, "channels", tuple(channels))
        whole()("outliers", self.outliers)
        if self.outliers not in self.counts:
            raise InputError(
                f"outliers={self.outliers!r} of {self.head_dim} channels do not leave two parts: choose a whole number "
                f"from {self.counts[0]} to {self.counts[-1]}."
            )
        _ = self.parts

    @property
    def layout(self) -> Layout:
        outliers, rest = (part.layout for part in self.parts)
        return {_OUTLIER + name: row for name, row in outliers.items()} | rest

    @property
    def code_dim(self) -> int:
        return sum(part.code_dim for part in self.parts)

    @property
    def shared_bytes(self) -> int:
        kv_heads = len(self.channels) // self.outliers
        return sum(part.shared_bytes for part in self.parts) + 2 * 4 * kv_heads * self.head_dim

    def blank(self, kv_heads: int) -> Self:
        return replace(self, channels=tuple(range(self.outliers)) * kv_heads)  # type: ignore[type-var]

    def fit(self, sample: Sample) -> Self:
        """Find the channels with the largest mean square, for each KV head; raises `InputError` as `learnable`."""
        check_vectors(sample.x, self.head_dim)
        learnable(sample.x, self.method)
        energy = np.array(mx.square(sample.x.astype(mx.float32)).sum(axis=(0, 2)))
        found = np.sort(np.argsort(-energy, axis=-1, kind="stable")[:, : self.outliers], axis=-1)
        return replace(self, channels=tuple(found.ravel().tolist()))  # type: ignore[type-var]

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        outliers, rest = (part.encode(y).arrays for part, y in zip(self.parts, self._split(x), strict=True))
        return Code({_OUTLIER + name: array for name, array in outliers.items()} | rest, start)

    def expand(self, code: Code) -> mx.array:
        outliers = Code({name: code.arrays[_OUTLIER + name] for name in self.parts[0].layout})
        expanded = []
        for part, own in zip(self.parts, (outliers, code), strict=True):
            y, scale = part.expand(own), part.scales(own)
            expanded.append(y if scale is None else y * scale)
        return mx.concatenate(expanded, axis=-1)

    def from_codes(self, y: mx.array) -> mx.array:
        order, inverse = self._order(y.shape[1])
        both = zip(self.parts, mx.split(y, [self.parts[0].code_dim], -1), strict=True)
        outliers, rest = (part.from_codes(own) for part, own in both)
        if rest.shape[-1] == self.head_dim:
            rest = _reordered(rest, order)[..., self.outliers :]
        return _reordered(mx.concatenate([outliers, rest], axis=-1), inverse)

    def query_to_codes(self, q: mx.array) -> mx.array:
        ours = [part.query_to_codes(own) for part, own in zip(self.parts, self._split(q), strict=True)]
        return mx.concatenate(ours, axis=-1)

    def _split(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The outlier channels of ``x`` ``[B, H, S, D]``, and the rest as the second part takes it."""
        order, inverse = self._order(x.shape[1])
        outliers, rest = mx.split(_reordered(x, order), [self.outliers], -1)
        if self.parts[1].head_dim == self.head_dim:
            rest = _reordered(mx.concatenate([mx.zeros_like(outliers), rest], axis=-1), inverse)
        return outliers, rest

    def _order(self, kv_heads: int) -> tuple[mx.array, mx.array]:
        """Channels in the order of the codes, and its inverse: each ``[1, H, 1, D]``."""
        if not self.channels:
            raise not_fitted(self.method, f", bits={self.bits}, outliers={self.outliers}")
        check_heads(len(self.channels) // self.outliers, kv_heads)
        return self._orders

    @cached_property
    def _orders(self) -> tuple[mx.array, mx.array]:
        heads = np.array(self.channels).reshape(-1, self.outliers)
        order = np.stack([np.concatenate([head, np.setdiff1d(np.arange(self.head_dim), head)]) for head in heads])
        there, back = (constant(a[None, :, None], mx.uint32) for a in (order, np.argsort(order, axis=-1)))
        return there, back


def _reordered(x: mx.array, order: mx.array) -> mx.array:
    return mx.take_along_axis(x, mx.broadcast_to(order, x.shape), axis=-1)
