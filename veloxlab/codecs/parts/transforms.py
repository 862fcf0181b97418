"""Random transforms of the head dimension, the same on every machine: rotations, and the sketch of signs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from veloxlab.checks import choice
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.packing import pack, unpack_to_bytes
from veloxlab.kernels.checked import computed
from veloxlab.kernels.rotated import rotate_kernel
from veloxlab.kernels.vectors import VectorKernel

SketchName = Literal["orthogonal", "gaussian"]
RotationName = Literal["hadamard", "haar"]


class SignedHadamard:
    """Random ``signs`` ``[dim]``, then an orthonormal Hadamard transform, for any ``dim`` = m·2^k.

    If m > 1, the 2^k-point Hadamard transforms of m blocks are mixed by an m-point Hartley transform, whose entries
    are as flat as a real orthogonal matrix of odd size allows. Both are symmetric, so each is its own inverse.
    """

    def __init__(self, dim: int, seed: int) -> None:
        self.signs = constant(np.random.default_rng(seed).choice([-1.0, 1.0], dim))
        odd = np.arange(dim // (dim & -dim))
        angle = 2 * np.pi * np.outer(odd, odd) / len(odd)
        self._hartley = constant((np.cos(angle) + np.sin(angle)) / np.sqrt(len(odd)))
        self.nbytes = self.signs.nbytes + self._hartley.nbytes

    def forward(self, x: mx.array) -> mx.array:
        """Rotate ``x`` ``[..., dim]``."""
        return self._turned(x, inverse=False)

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""
        return self._turned(y, inverse=True)

    def _turned(self, x: mx.array, *, inverse: bool) -> mx.array:
        """One kernel if the device has it, unless MLX's own transform is enough."""

        def by_graph(x: mx.array) -> dict[str, mx.array]:
            return {"out": self._transform(x) * self.signs if inverse else self._transform(x * self.signs)}

        if x.ndim != 4 or len(self._hartley) == 1:
            return by_graph(x)["out"]
        return computed(lambda _: _kernel(self, inverse), lambda x: by_graph(x.astype(mx.float32)), x)["out"]

    def _transform(self, x: mx.array) -> mx.array:
        if x.size == 0:
            return x  # MLX's transform refuses empty arrays
        if len(self._hartley) == 1:
            return mx.hadamard_transform(x)
        return mx.flatten(self._hartley @ mx.hadamard_transform(mx.unflatten(x, -1, (len(self._hartley), -1))), -2)


@lru_cache
def _kernel(rotation: SignedHadamard, inverse: bool) -> VectorKernel | None:
    return rotate_kernel(rotation.signs, inverse=inverse)


class Haar:
    """A rotation drawn uniformly (Haar measure): Q of the QR of a Gaussian matrix, with R's diagonal made positive."""

    def __init__(self, dim: int, seed: int) -> None:
        q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
        self.matrix = constant(q * np.sign(np.diag(r)))  # QR's choice of signs would not be uniform
        self.nbytes = self.matrix.nbytes

    def forward(self, x: mx.array) -> mx.array:
        """Rotate ``x`` ``[..., dim]``."""
        return x @ self.matrix.T

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""
        return y @ self.matrix


Rotation = SignedHadamard | Haar


@lru_cache
def make_rotation(name: RotationName, dim: int, seed: int) -> Rotation:
    """Make the rotation called ``name``: ``"hadamard"`` (signs, then Hadamard) or ``"haar"`` (uniform, dense)."""
    name = choice(*get_args(RotationName))("rotation", name)
    return SignedHadamard(dim, seed) if name == "hadamard" else Haar(dim, seed)


class SignSketch:
    """The signs of ``rows`` random projections, which give unbiased estimates of inner products (QJL).

    ``"gaussian"`` draws them independently, as the papers do; ``"orthogonal"`` draws blocks of ``dim`` orthogonal rows
    of length √dim, with about 2.75 times less variance for the same bits. ``rows`` is a multiple of ``dim``. ``matrix``
    is the projection ``[rows, dim]``, float32, and ``unbiased_scale`` the c with which ``c·‖x‖·⟨Sq, sign(Sx)⟩`` has the
    mean ``⟨q, x⟩``: 1 / (rows · E|⟨row, u⟩|) for a unit ``u``.
    """

    def __init__(self, dim: int, rows: int, sketch: SketchName, seed: int) -> None:
        self.rows = rows
        if sketch == "gaussian":
            self.matrix = constant(np.random.default_rng(seed).standard_normal((rows, dim)))
            mean_abs = math.sqrt(2 / math.pi)
        else:
            blocks = [Haar(dim, seed + i).matrix for i in range(rows // dim)]
            self.matrix = constant(mx.concatenate(blocks) * math.sqrt(dim))
            # a row is uniform on the sphere of radius √dim, not Gaussian
            mean_abs = math.sqrt(dim / math.pi) * math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2))
        self.unbiased_scale, self.nbytes = 1 / (rows * mean_abs), self.matrix.nbytes

    def expand(self, words: mx.array) -> mx.array:
        """Packed bits to ±1 ``[..., rows]``, float32."""
        return unpack_to_bytes(words, 1, self.rows).astype(mx.float32) * 2 - 1


make_sketch = lru_cache(SignSketch)


def pack_signs(y: mx.array) -> mx.array:
    """Signs of projections ``[..., rows]`` as packed bits ``[..., words]``; the sign of 0 is +1."""
    return pack((y >= 0).astype(mx.uint32), 1)
