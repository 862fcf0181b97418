"""Random transforms of the head dimension: rotations, and the sign sketch that TurboQuant's ``prod`` and QJL share.

A rotation keeps inner products, so the query is rotated once and compared with rotated keys, and a mix of rotated
values is rotated back once. Every rotation here is a frozen dataclass of plain numbers: its arrays follow from
``(dim, seed)``, are built once per process, and are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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
ROTATION = choice(*get_args(RotationName))


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
        return self._at_once(x, lambda x: self._transform(x * self.signs), inverse=False)

    def inverse(self, y: mx.array) -> mx.array:
        """Undo `forward`."""
        return self._at_once(y, lambda y: self._transform(y) * self.signs, inverse=True)

    @property
    def signs(self) -> mx.array:
        """±1 for each coordinate ``[dim]``, float32."""
        return _signs(self.dim, self.seed)

    @property
    def nbytes(self) -> int:
        """Bytes of the signs and of the Hartley matrix."""
        return self.signs.nbytes + _hartley(self._odd).nbytes

    @property
    def _odd(self) -> int:
        return self.dim // (self.dim & -self.dim)

    def _at_once(self, x: mx.array, by_graph: Callable[[mx.array], mx.array], *, inverse: bool) -> mx.array:
        """By one kernel where MLX's own transform alone does not do and there is a GPU, else ``by_graph``."""
        if x.ndim != 4 or self._odd == 1:
            return by_graph(x)
        return computed(lambda _: _kernel(self, inverse), lambda x: {"out": by_graph(x)}, x)["out"]

    def _transform(self, x: mx.array) -> mx.array:
        if x.size == 0:
            return x  # MLX's transform refuses empty arrays
        if self._odd == 1:
            return mx.hadamard_transform(x)
        blocks = mx.hadamard_transform(mx.unflatten(x, -1, (self._odd, -1)))
        return mx.flatten(_hartley(self._odd) @ blocks, -2)


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


Rotation = SignedHadamard | Haar


def make_rotation(name: RotationName, dim: int, seed: int) -> Rotation:
    """Make the rotation called ``name``: ``"hadamard"`` (signs, then Hadamard) or ``"haar"`` (uniform, dense)."""
    return SignedHadamard(dim, seed) if ROTATION("rotation", name) == "hadamard" else Haar(dim, seed)


@lru_cache
def haar_matrix(dim: int, seed: int) -> mx.array:
    """A uniformly random orthogonal matrix ``[dim, dim]``, float32."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return constant(q * np.sign(np.diag(r)))  # without the signs QR's own choice shows


@lru_cache
def _signs(dim: int, seed: int) -> mx.array:
    return constant(np.random.default_rng(seed).choice([-1.0, 1.0], dim))


@lru_cache
def _hartley(size: int) -> mx.array:
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    return constant((np.cos(angle) + np.sin(angle)) / np.sqrt(size))


@dataclass(frozen=True)
class SignSketch:
    """The signs of a random projection, from which inner products are estimated without bias (QJL, arXiv 2406.03482).

    ``rows`` projections of ``dim`` coordinates. ``"gaussian"`` draws them independently, as the papers do;
    ``"orthogonal"`` draws blocks of ``dim`` orthogonal rows of length √dim, with about 2.75 times less variance
    for the same bits. ``rows`` is a multiple of ``dim``.
    """

    dim: int
    rows: int
    sketch: SketchName = "orthogonal"
    seed: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the projection, shared by every layer of a process."""
        return self.matrix.nbytes

    @property
    def matrix(self) -> mx.array:
        """The projection ``[rows, dim]``, float32."""
        return _sketch_matrix(self)

    @property
    def unbiased_scale(self) -> float:
        """``c`` such that ``c·‖x‖·⟨Sq, sign(Sx)⟩`` has mean ``⟨q, x⟩``: 1 / (rows · E|⟨row, u⟩|) for a unit ``u``."""
        mean_abs = math.sqrt(2 / math.pi)
        if self.sketch == "orthogonal":  # a row is uniform on the sphere of radius √dim, not Gaussian
            log_ratio = math.lgamma(self.dim / 2) - math.lgamma((self.dim + 1) / 2)
            mean_abs = math.sqrt(self.dim / math.pi) * math.exp(log_ratio)
        return 1 / (self.rows * mean_abs)

    def signs(self, x: mx.array) -> mx.array:
        """Signs of the projections of ``x`` ``[..., dim]`` as packed bits ``[..., words]``."""
        return pack_signs(x @ self.matrix.T)

    def expand(self, words: mx.array) -> mx.array:
        """Packed bits to ±1 ``[..., rows]``, float32."""
        return unpack_to_bytes(words, 1, self.rows).astype(mx.float32) * 2 - 1


def pack_signs(y: mx.array) -> mx.array:
    """Signs of projections ``[..., rows]`` as packed bits ``[..., words]``; the sign of 0 is +1."""
    return pack((y >= 0).astype(mx.uint32), 1)


@lru_cache
def _sketch_matrix(sketch: SignSketch) -> mx.array:
    if sketch.sketch == "gaussian":
        return constant(np.random.default_rng(sketch.seed).standard_normal((sketch.rows, sketch.dim)))
    blocks = [haar_matrix(sketch.dim, sketch.seed + i) for i in range(sketch.rows // sketch.dim)]
    return constant(mx.concatenate(blocks) * math.sqrt(sketch.dim))
