"""Orthogonal transforms of the head dimension, which spread a vector's energy evenly over its coordinates.

A rotation keeps inner products, so the query is rotated once and compared with rotated keys, and a mix of rotated
values is rotated back once. Every rotation here is a frozen dataclass of plain numbers: its arrays follow from
``(dim, seed)``, are built once per process, and are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import mlx.core as mx
import numpy as np

from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.rotated import rotate_kernel
from veloxlab.kernels.vectors import VectorKernel

RotationName = Literal["hadamard", "haar"]


class Rotation(Protocol):
    """An orthogonal map of the last axis, ``[..., dim]`` to ``[..., dim]``."""

    def forward(self, x: mx.array) -> mx.array:
        """Rotate ``x`` ``[..., dim]``."""

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays it keeps, shared by every layer of a process."""


def make_rotation(name: RotationName, dim: int, seed: int) -> Rotation:
    """Make the rotation called ``name``: ``"hadamard"`` (signs, then Hadamard) or ``"haar"`` (uniform, dense)."""
    if name == "hadamard":
        return SignedHadamard(dim, seed)
    if name == "haar":
        return Haar(dim, seed)
    raise InputError(f"Unknown rotation {name!r}: choose 'hadamard' or 'haar'.")


@dataclass(frozen=True)
class SignedHadamard:
    """Random signs, then an orthonormal Hadamard transform, for any ``dim`` = m·2^k.

    Where m > 1 the 2^k-point Hadamard transforms of m blocks are mixed by an m-point Hartley transform, whose entries
    are as flat as a real orthogonal matrix of odd size allows. Both are symmetric, so each is its own inverse.
    """

    dim: int
    seed: int

    def forward(self, x: mx.array) -> mx.array:
        """Rotate ``x`` ``[..., dim]``."""
        return self._at_once(x, self._forward, inverse=False)

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""
        return self._at_once(y, self._inverse, inverse=True)

    @property
    def signs(self) -> mx.array:
        """±1 for each coordinate ``[dim]``, float32."""
        return _signs(self.dim, self.seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the signs and of the Hartley matrix."""
        return _signs(self.dim, self.seed).nbytes + _hartley(_odd_part(self.dim)).nbytes

    def _at_once(self, x: mx.array, by_graph: Callable[[mx.array], mx.array], *, inverse: bool) -> mx.array:
        """By one kernel where MLX's own transform alone does not do and there is a GPU, else ``by_graph``."""
        if x.ndim != 4 or _odd_part(self.dim) == 1:
            return by_graph(x)
        return computed(lambda _: _kernel(self, inverse), lambda x: {"out": by_graph(x)}, x)["out"]

    def _forward(self, x: mx.array) -> mx.array:
        return self._spread(x * self.signs)

    def _inverse(self, y: mx.array) -> mx.array:
        return self._spread(y) * self.signs

    def _spread(self, x: mx.array) -> mx.array:
        if x.size == 0:
            return x  # MLX's transform refuses empty arrays
        odd = _odd_part(self.dim)
        if odd == 1:
            return mx.hadamard_transform(x)
        blocks = mx.hadamard_transform(x.reshape(*x.shape[:-1], odd, self.dim // odd))
        return (_hartley(odd) @ blocks).reshape(x.shape)


@lru_cache
def _kernel(rotation: SignedHadamard, inverse: bool) -> VectorKernel | None:
    return rotate_kernel(rotation.signs, inverse=inverse)


@dataclass(frozen=True)
class Haar:
    """A rotation drawn uniformly (Haar measure): Q of the QR of a Gaussian matrix, with R's diagonal made positive."""

    dim: int
    seed: int

    def forward(self, x: mx.array) -> mx.array:
        """Rotate ``x`` ``[..., dim]``."""
        return x @ haar_matrix(self.dim, self.seed).T

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""
        return y @ haar_matrix(self.dim, self.seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return haar_matrix(self.dim, self.seed).nbytes


@lru_cache
def haar_matrix(dim: int, seed: int) -> mx.array:
    """A uniformly random orthogonal matrix ``[dim, dim]``, float32."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    matrix = mx.array((q * np.sign(np.diag(r))).astype(np.float32))  # without the signs QR's own choice shows
    mx.eval(matrix)  # evaluated arrays can be used from any thread
    return matrix


@lru_cache
def _signs(dim: int, seed: int) -> mx.array:
    signs = mx.array(np.random.default_rng(seed).choice([-1.0, 1.0], dim).astype(np.float32))
    mx.eval(signs)
    return signs


@lru_cache
def _hartley(size: int) -> mx.array:
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    matrix = mx.array(((np.cos(angle) + np.sin(angle)) / np.sqrt(size)).astype(np.float32))
    mx.eval(matrix)
    return matrix


def _odd_part(dim: int) -> int:
    return dim // (dim & -dim)
