"""SpectralQuant: a basis for each KV head, and bits by the variance of its coordinates.

Paper: *3 % Is All You Need*, A. Gopinath, 2026, and its water-filled second version with A. B. Vangara, 2026; neither
is on arXiv (github.com/Dynamis-Labs/spectralquant). ``basis="query"`` is *WUSH-KV*'s (ISTA, 2026). OSCAR found that
queries should choose a key's coordinates (arXiv 2605.17757).

Stored per vector of D coordinates
    One bit string of b·D bits, where coordinate i has bᵢ = 0 … 8, and one 16-bit scale: b + 16/D bits per value.
Learned per layer
    For each KV head a basis, its standard deviations and means, in float32. One bit plan for all heads of a layer, from
    their mean sorted spectrum; every head sorts its coordinates in that order.
Reach
    Keys come after RoPE, so all that is learned of them fits the positions of the calibration text. Later keys lose
    many times as much: calibrate with as many ``tokens`` as your longest text has.

The steps: transform to the basis; divide by the root-mean-square; subtract the mean; quantize coordinate i with the
Lloyd–Max levels of N(0, λᵢ). Bits are by integer water-filling: one at a time to argmax λᵢ / 4^bᵢ.

Where we differ
    * ``basis``. ``"pca"`` is the paper's: eigenvectors of the head's own keys or values. ``"query"`` minimises the
      error of q·k: with LLᵀ the second moment of the queries, PCA of Lᵀk, not orthogonal in k; for values it is
      ``"pca"``. ``"hadamard"`` learns only means and variances.
    * ``centred`` stores the mean separately, without bits per token. ``False``, uncentred moments, is the paper's.
    * ``damping`` adds 5 % of the mean variance to all, because a short sample's spectrum is too steep for other texts.
    * The paper stores the norm. ``mse`` stores ⟨y, ŷ⟩/‖ŷ‖² (in the metric of the basis) and is the default of keys too:
      an ``unbiased`` scale would compensate coordinates without bits by scaling those that are nearly exact.
    * No selective sketch (QJL): the paper's own ablation is better without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Self

import mlx.core as mx
import numpy as np

from veloxlab.checks import real
from veloxlab.codecs.base import Code, Codec, Sample, check_heads, check_vectors, not_fitted
from veloxlab.codecs.method import Method, Tensor
from veloxlab.codecs.parts import Floats, constant, packing, scales
from veloxlab.codecs.parts.learning import damped, learnable, per_head
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.scalar import PlannedQuantizer
from veloxlab.codecs.parts.transforms import SignedHadamard
from veloxlab.codecs.parts.water_filling import greedy_bits
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.devices import current_backend
from veloxlab.kernels.encode import plan_kernel
from veloxlab.kernels.readers import PlanReader
from veloxlab.kernels.vectors import VectorKernel

BasisName = Literal["pca", "query", "hadamard"]

_METRIC_DAMPING = 1e-2  # WUSH's γ: the share of the queries' mean energy that is added in every direction
_LARGEST_FACTOR = 4.0  # of an unbiased scale: a vector in directions without bits would need an infinite one


@dataclass(frozen=True, eq=False)
class SpectralQuant(Codec):
    """SpectralQuant of keys or values; see the module. ``bits`` are the mean code bits per coordinate.

    Learned: ``plan``, the bits of each coordinate of the basis, descending; ``forward`` ``[H, D, D]`` to the basis,
    with ``y = x @ forward``, and ``backward`` from it, None for the transpose; ``mean`` and ``deviation`` of each
    coordinate ``[H, 1, D]``, for vectors of root-mean-square 1.
    """

    reaches_by: ClassVar[str] = "tokens={N}"
    head_dim: int
    bits: int
    basis: BasisName = "pca"
    centred: bool = True
    damping: float = 0.05
    scale: scales.ScaleName = "mse"
    seed: int = 0
    plan: tuple[int, ...] = ()
    forward: mx.array | None = None
    backward: mx.array | None = None
    mean: mx.array | None = None
    deviation: mx.array | None = None

    def __post_init__(self) -> None:
        self._check(damping=real(least=0))
        if self.plan:
            _ = self._quantizer

    @property
    def layout(self) -> packing.Layout:
        return {"codes": packing.packed(self.head_dim, self.bits), "root_scale": scales.SCALE}

    def fit(self, sample: Sample) -> Self:
        """Learn basis, variances and bit plan; raises `InputError` below D tokens that vary, or without queries."""
        check_vectors(sample.x, self.head_dim)
        x = learnable(sample.x, "SpectralQuant", self.head_dim)
        rms = np.sqrt(np.square(x).mean(axis=-1, keepdims=True))
        x = x / np.where(rms == 0, 1.0, rms)
        mean = x.mean(axis=1, keepdims=True) * self.centred
        moment = damped(np.swapaxes(x - mean, 1, 2) @ (x - mean) / x.shape[1], self.damping)
        forward, backward = self._bases(moment, sample.queries)
        variance = np.einsum("hij,hik,hkj->hj", forward, moment, forward)
        order = np.argsort(-variance, axis=1, kind="stable")
        variance = np.take_along_axis(variance, order, 1)
        variance = np.maximum(variance, 1e-9 * variance[:, :1])
        forward = np.take_along_axis(forward, order[:, None], 2)
        shares = variance / variance.sum(axis=1, keepdims=True)  # every head counts the same
        return replace(
            self,
            plan=greedy_bits(shares.mean(axis=0).tolist(), self.bits * self.head_dim),
            forward=constant(forward),
            backward=None if backward is None else constant(np.take_along_axis(backward, order[:, :, None], 1)),
            mean=constant(mean @ forward),
            deviation=constant(np.sqrt(variance)[:, None]),
        )

    def blank(self, kv_heads: int) -> Self:
        """Equal bits for every coordinate; see `Codec.blank`. A learned plan's table is up to 2 KB larger."""
        matrix, row = mx.zeros((kv_heads, self.head_dim, self.head_dim)), mx.zeros((kv_heads, 1, self.head_dim))
        backward = matrix if self.basis == "query" else None
        plan = (self.bits,) * self.head_dim
        blank = replace(self, plan=plan, forward=matrix, backward=backward, mean=row, deviation=row)
        if current_backend() is not None:
            _ = blank._encoder, blank._fit, blank._quantizer.kernel_plan  # kernels keep the tables of a fitted codec
        return blank

    def _bases(self, moment: Floats, queries: mx.array | None) -> tuple[Floats, Floats | None]:
        """Matrices to the basis ``[H, D, D]``, and back if that is not the transpose; columns are in any order."""
        if self.basis == "hadamard":
            rotation = SignedHadamard(self.head_dim, self.seed).forward(mx.eye(self.head_dim))
            return np.repeat(np.array(rotation, np.float64)[None], len(moment), 0), None
        if self.basis == "pca":
            return np.linalg.eigh(moment).eigenvectors, None
        if queries is None:
            raise InputError("A query-weighted basis needs the model's queries, which it does not show: take 'pca'.")
        asked = per_head(queries).reshape(len(moment), -1, self.head_dim)  # grouped by KV head
        metric = np.linalg.cholesky(damped(np.swapaxes(asked, 1, 2) @ asked / asked.shape[1], _METRIC_DAMPING))  # L
        vectors = np.linalg.eigh(np.swapaxes(metric, 1, 2) @ moment @ metric).eigenvectors  # U
        return metric @ vectors, np.swapaxes(np.linalg.solve(np.swapaxes(metric, 1, 2), vectors), 1, 2)

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        forward, _, _, _ = self._fitted(x.shape[1])
        y = x.astype(mx.float32) @ forward
        return Code(computed(lambda _: self._encoder, self._encode_by_graph, x, y), start)

    def _encode_by_graph(self, x: mx.array, y: mx.array) -> dict[str, mx.array]:
        """Codes and scales of ``x``, whose coordinates in the basis are ``y``; both ``[B, H, S, D]``."""
        _, _, mean, deviation = self._fitted(x.shape[1])
        rms = scales.root_mean_square(x)
        y = scales.over(y, rms)
        codes = self._quantizer.assign((y - mean) / deviation)
        factor = _scale_factor(self.scale, y, self._quantizer.levels_of(codes) * deviation + mean)
        return {"codes": self._quantizer.pack(codes), "root_scale": scales.store_scale(rms * factor)}

    @cached_property
    def _encoder(self) -> VectorKernel | None:
        _, _, mean, deviation = self._fitted()
        return plan_kernel(self._quantizer.encoder_tables, mean, deviation, self.scale, _LARGEST_FACTOR)

    def expand(self, code: Code) -> mx.array:
        words = code.arrays["codes"]
        _, _, mean, deviation = self._fitted(words.shape[1])
        return self._quantizer.expand(words) * deviation + mean

    def from_codes(self, y: mx.array) -> mx.array:
        return y @ self._fitted(y.shape[1])[1]

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Into the dual basis, which is the basis itself if it is orthonormal."""
        return q @ self._fitted(q.shape[1])[1].swapaxes(-1, -2)

    def reader(self, code: Code) -> PlanReader:
        words = code.arrays["codes"]
        self._fitted(words.shape[1])
        return PlanReader(self.head_dim, words, code.arrays["root_scale"], None, self._quantizer.kernel_plan, self._fit)

    @cached_property
    def _quantizer(self) -> PlannedQuantizer:
        return PlannedQuantizer(self.plan)

    @cached_property
    def _fit(self) -> mx.array:
        """Deviation and mean of each coordinate ``[H, D, 2]``, in a kernel's form."""
        _, _, mean, deviation = self._fitted()
        return constant(mx.stack([deviation[:, 0], mean[:, 0]], axis=-1))

    def _fitted(self, kv_heads: int | None = None) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        if self.forward is None or self.mean is None or self.deviation is None:
            raise not_fitted("SpectralQuant", f", bits={self.bits}")
        check_heads(self.forward.shape[0], kv_heads or self.forward.shape[0])
        backward = self.forward.swapaxes(-1, -2) if self.backward is None else self.backward
        return self.forward, backward, self.mean, self.deviation


class EffectiveDimensions(NamedTuple):
    """Participation ratios (Σλ)² / Σλ² of each KV head ``[H]``: of the second moments, and of those about the mean."""

    uncentred: Floats
    centred: Floats


def effective_dimensions(x: mx.array) -> EffectiveDimensions:
    """The effective number of directions of keys or values ``[B, H, S, D]``, for each KV head, 1 to D; 0 for zeros."""

    def participation(y: Floats) -> Floats:
        moment = np.swapaxes(y, 1, 2) @ y
        squares = np.square(moment).sum(axis=(1, 2))
        return np.asarray(np.square(np.trace(moment, axis1=1, axis2=2)) / np.where(squares == 0, 1.0, squares))

    y = per_head(x)
    return EffectiveDimensions(participation(y), participation(y - y.mean(axis=1, keepdims=True)))


def _scale_factor(scale: scales.ScaleName, y: mx.array, quantized: mx.array) -> mx.array:
    """The factor of ``quantized`` that approximates ``y``, both ``[..., D]``: ``[..., 1]``, finite and positive."""
    if scale == "norm":
        return mx.ones((*y.shape[:-1], 1))
    inner = (y * quantized).sum(axis=-1, keepdims=True)
    if scale == "mse":
        energy = mx.square(quantized).sum(axis=-1, keepdims=True)
        return mx.maximum(inner, 0.0) / mx.where(energy == 0, 1.0, energy)
    energy = mx.square(y).sum(axis=-1, keepdims=True)
    energy = mx.where(energy == 0, 1.0, energy)
    return energy / mx.maximum(inner, energy / _LARGEST_FACTOR)


def build(head_dim: int, bits: int, tensor: Tensor, **options: object) -> SpectralQuant:
    """SpectralQuant for keys or values, to be fitted; for values ``basis="query"`` is ``"pca"``."""
    if tensor == "values" and options.get("basis") == "query":
        options["basis"] = "pca"
    return SpectralQuant(head_dim, bits, **options)  # type: ignore[arg-type]


METHOD = Method(
    id="spectralquant",
    name="SpectralQuant",
    paper="Gopinath and Vangara 2026, not on arXiv",
    calibrated=True,
    bits=range(1, 9),
    stored="b bits a coordinate on average, more where the variance is; one 16-bit scale a vector",
    options=("basis", "centred", "damping", "scale", "seed"),
    build=build,
    colour="#b58900",
    mark="triangle-down",
    space="eigenbasis",
    timed=True,
)
