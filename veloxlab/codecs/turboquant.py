"""TurboQuant: a random rotation, then the best scalar quantizer of one coordinate.

Paper: *TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate*, A. Zandieh, M. Daliri, M. Hadian,
V. Mirrokni, 2025 (ICLR 2026), arXiv 2504.19874. The scales are those of DRIVE (NeurIPS 2021) and EDEN (ICML 2022; see
arXiv 2604.18555). HIGGS does the same for weights (arXiv 2411.17525), AQUA-KV for KV caches (arXiv 2501.19392).

Stored per vector of D coordinates
    ``mse``  b·D bits of codes and one 16-bit scale: b + 16/D bits per value.
    ``prod`` (b − 1)·D bits of codes, D sketch signs, the scale and the residual's norm: b + 32/D bits per value.
    ``mse`` with ``outliers=k``: b'·k + b·(D − k) bits of codes and two scales.

Where we differ
    * The rotation is signs and Hadamard by default, not a dense Haar matrix: D log D work, with the same distortion.
    * The paper stores the norm (``norm``), which shrinks inner products by 1 − D(b), 12 % at 2 bits. ``unbiased``
      stores ‖x‖²/⟨x, x̂⟩ and is the default for keys; ``mse`` stores ⟨x, x̂⟩/‖x̂‖² and is the default for values.
    * The sketch of ``prod`` may be orthogonal. At equal bits ``mse`` with the unbiased scale still has 4 to 6 times
      less variance: ``prod`` is here for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import mlx.core as mx

from veloxlab.checks import choice
from veloxlab.codecs.base import Code
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.codebooks import CodebookName
from veloxlab.codecs.parts.outliers import SplitCodec
from veloxlab.codecs.parts.packing import BITS, WIDEST, Layout, packed
from veloxlab.codecs.parts.scalar import ScalarQuantizer, quantizer_for
from veloxlab.codecs.parts.scales import SCALE, ScaleName, unbiased_keys
from veloxlab.codecs.parts.transforms import RotationName, SignSketch, SketchName, make_sketch, pack_signs
from veloxlab.codecs.rotated import RotatedCodec, TableCodec
from veloxlab.errors import InputError
from veloxlab.kernels.rotated import encode_kernel, nearest_level
from veloxlab.kernels.vectors import VectorKernel

_ONLY = {"scale": "mse", "outliers": "mse", "outlier_bits": "mse", "sketch": "prod"}  # options of one variant
_SKETCH_SEED = 1_000_003  # makes the sketch independent of a Haar rotation with the same seed


@dataclass(frozen=True)
class TurboQuant(TableCodec):
    """TurboQuant's ``mse`` variant: codes and one scale (arXiv 2504.19874, Algorithm 1).

    ``head_dim`` is 4 or more, ``bits`` 1 to 8 per coordinate, ``codebook`` ``"sphere"`` (exact for D) or ``"gaussian"``
    (its limit); for ``scale``, ``rotation`` and ``seed`` see `ScaleName` and `RotatedSpace`.
    """

    head_dim: int
    bits: int
    scale: ScaleName = "unbiased"
    rotation: RotationName = "hadamard"
    codebook: CodebookName = "sphere"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(bits=BITS)
        _ = self._rotation, self._quantizer  # refuses what it cannot do now, not at the first token

    @cached_property
    def _quantizer(self) -> ScalarQuantizer:
        return quantizer_for(self.head_dim, self.bits, self.codebook)

    @property
    def _table(self) -> mx.array:
        return self._quantizer.levels


@dataclass(frozen=True)
class TurboQuantProd(RotatedCodec):
    """TurboQuant's ``prod`` variant: b − 1 bits of codes, then a sign sketch of the residual (Algorithm 2).

    Unbiased: decode = ‖x‖·(x̂ + c·‖r‖·Sᵀ sign(S r)) for the residual r of the rotated unit vector. The ``sketch`` is
    ``"gaussian"`` as in the paper, or ``"orthogonal"``.
    """

    head_dim: int
    bits: int
    sketch: SketchName = "gaussian"
    rotation: RotationName = "hadamard"
    codebook: CodebookName = "sphere"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check(bits=BITS)
        _ = self._rotation, self._quantizer, self._sketch

    @cached_property
    def _quantizer(self) -> ScalarQuantizer | None:
        return quantizer_for(self.head_dim, self.bits - 1, self.codebook) if self.bits > 1 else None

    @cached_property
    def _sketch(self) -> SignSketch:
        return make_sketch(self.head_dim, self.head_dim, self.sketch, self.seed + _SKETCH_SEED)

    @property
    def layout(self) -> Layout:
        codes = {"codes": packed(self.head_dim, self.bits - 1)} if self.bits > 1 else {}
        return codes | {"signs": packed(self.head_dim, 1), "residual_norm": SCALE, "root_scale": SCALE}

    @cached_property
    def _encoder(self) -> VectorKernel | None:
        own, bits = self._quantizer, self.bits - 1
        table = (own.boundaries, own.levels) if own else (constant(mx.zeros(0)), constant(mx.zeros(1)))
        nearest, fields = nearest_level(*table, bits), {"codes": bits} if own else {}
        return encode_kernel(self.head_dim, self._signs, nearest, "norm", fields, sketch=self._sketch.matrix)

    def quantize(self, y: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        arrays, residual = {}, y
        if self._quantizer:
            codes = self._quantizer.assign(y)
            arrays, residual = self._quantizer.pack(codes), y - self._quantizer.levels_of(codes)
        norm = mx.linalg.norm(residual, axis=-1, keepdims=True)
        arrays["signs"] = pack_signs(residual @ self._sketch.matrix.T)
        arrays["residual_norm"] = norm.astype(mx.float16)  # at most √D
        return arrays, mx.ones_like(norm)

    def expand(self, code: Code) -> mx.array:
        estimate = self._sketch.expand(code.arrays["signs"]) @ self._sketch.matrix
        residual = estimate * (code.arrays["residual_norm"].astype(mx.float32) * self._sketch.unbiased_scale)
        return residual + self._quantizer.expand(code.arrays) if self._quantizer else residual


@dataclass(frozen=True, eq=False)
class TurboQuantSplit(SplitCodec):
    """A `TurboQuant` of ``outlier_bits`` for the channels of most energy, and one for the rest: see `SplitCodec`."""

    method: ClassVar[str] = "TurboQuant"
    head_dim: int
    bits: int
    outliers: int
    outlier_bits: int
    scale: ScaleName = "unbiased"
    rotation: RotationName = "hadamard"
    codebook: CodebookName = "sphere"
    seed: int = 0
    channels: tuple[int, ...] = ()

    @property
    def counts(self) -> range:
        """A rotated codebook takes 4 or more channels."""
        return range(4, self.head_dim - 3)

    @cached_property
    def parts(self) -> tuple[TurboQuant, TurboQuant]:
        shared = (self.scale, self.rotation, self.codebook, self.seed)
        rest = self.head_dim - self.outliers
        return TurboQuant(self.outliers, self.outlier_bits, *shared), TurboQuant(rest, self.bits, *shared)


def build(
    head_dim: int, bits: int, tensor: Tensor, *, variant: str = "mse", outliers: int = 0, **options: object
) -> TurboQuant | TurboQuantProd | TurboQuantSplit:
    """For keys (unbiased scale) or values (MSE scale); ``outliers`` channels get ``outlier_bits``, or one bit more."""
    choice("mse", "prod")("variant", variant)
    for name, value in ({"outliers": outliers or None} | options).items():
        if value is not None and _ONLY.get(name, variant) != variant:
            raise InputError(
                f"{name}={value!r} is for variant={_ONLY[name]!r} alone, and the variant is {variant!r}: leave out one "
                "of the two."
            )
    outlier_bits: Any = options.pop("outlier_bits", None)
    if variant == "prod":
        return TurboQuantProd(head_dim, bits, **options)  # type: ignore[arg-type]
    if outlier_bits is not None and not outliers:
        raise InputError(f"outlier_bits={outlier_bits!r} was given without outliers: give both, as outliers=32.")
    settings = unbiased_keys(tensor, options)
    if not outliers:
        return TurboQuant(head_dim, bits, **settings)
    wider = min(bits + 1, WIDEST) if outlier_bits is None else outlier_bits
    return TurboQuantSplit(head_dim, bits, outliers, wider, **settings)


METHOD = Method(
    id="turboquant",
    name="TurboQuant",
    paper="Zandieh et al. 2025, arXiv 2504.19874",
    bits=range(1, 9),
    stored="b bits a coordinate, one 16-bit scale a vector",
    options=("variant", "scale", "sketch", "outliers", "outlier_bits", "rotation", "codebook", "seed"),
    build=build,
    colour="#3b7dd8",
    mark="circle",
    timed=True,
)
