"""FisherQuant: codes in the metric of the loss, bits by one water-filling over the whole model, a short trellis.

No paper has this combination. Its parts are from: *WUSH* (ISTA, arXiv 2512.00956; the transform from two Cholesky
factors, which is best for a quadratic loss), *OSCAR* (arXiv 2605.17757; a key's coordinates chosen by queries),
*KVQuant* (C. Hooper et al., 2024, arXiv 2401.18079; mean and metric before RoPE, gradients as weights), *RateQuant*
(F. Zuo et al., 2026, arXiv 2605.06675; bits by sensitivity), *QTIP* (A. Tseng et al., 2024, arXiv 2406.11235; the
bitshift trellis).

For each KV head's keys and values x, with gradients g, where E[ggᵀ] is the Fisher matrix of the model's predictions
    1. Mean μ: of values, and of keys *before* RoPE. The code is of k_t − R_t μ.
    2. Metric: H = E[ggᵀ] + 3 % of its mean variance, with the longest 1 % of g shortened.
       C = Σ w xxᵀ / Σ w, w = min(‖g‖² / mean, 20) + 0.2.
       With H = LLᵀ and LᵀCL = UΛUᵀ, Λ ascending, the coordinates are y = x·LU, and x = y·UᵀL⁻¹.
       Calibration reads the first positions of a text. A model's predictions do not depend on where a text begins, so
       at later positions H and C of keys are the same, rotated. 8 such positions, up to ``positions``, weigh 15 %.
    3. Ranges: σᵢ² = E[wᵢyᵢ²] / E[wᵢ], wᵢ = min(gᵢ² / mean, 30) + 0.05, gᵢ the gradient by yᵢ.
    4. Bits: a coordinate of b bits loses ½ σᵢ² D(b) nats. When a cache is made, one reverse water-filling over all
       coordinates of all heads, layers, keys and values gives each 0 to 8 bits: one calibration serves every budget.
    5. Code: yᵢ / σᵢ by ``code="trellis"`` with tables of 256 or 1,024 ``entries``, or ``"scalar"``, Lloyd–Max levels:
       see `veloxlab.codecs.parts.trellis`. The string with the least Σ σᵢ²(yᵢ / σᵢ − levelᵢ)² is taken. The distortion
       of a unit Gaussian at 1, 2, 3, 4 bits is .297, .0852, .0225, .0068; with 1,024 entries .291, .0814, .0221, .0059;
       with Lloyd–Max levels .363, .1175, .0345, .0095.
    6. Scale: 2^(c/4), c = 0 … 15 the nearest to 4 log₂ ρ + 3.2 − ¾ b, ρ the root-mean-square of y / σ and b the mean
       bits of the head's coordinates. It is for outliers alone, with headroom. Without it squared errors are smaller,
       but the model's loss is larger.

Stored per token
    One row of bits for all KV heads: 4 bits for each head's scale, then each head's string. ``bits`` are true bits,
    scales included: every row is a whole number of 32-bit words, and the water-filling allocates words.
Learned per layer
    For each head two D × D matrices, to y/σ and back, in float16, its mean, and σ².
Reading
    A query is multiplied with the second matrix once. q·R_t μ is a product with cosines and sines of the position,
    which follow the coordinates of a key: a vector of codes is linear in both.

Options that switch a part off; one calibration serves all of them
    ``metric="pca"``: errors cost the same in all directions of a head; ``"none"``: the head's own coordinates too.
    ``centre="still"``: the mean is of keys after RoPE; ``"none"``: it is zero.
    ``planning="head"``: equal bits for every head; ``"none"``: for every coordinate. ``scale="none"``: scales are 1.
Options of a calibration
    ``positions``: the length of texts to be read, 8,192 by default. With 512, short texts lose less, and long ones much
    more. ``basis="before_rope"``: keys are coded before RoPE. They lose less, and in long texts much less, because
    positions do not blur their structure. No kernel reads them: MLX operations decode and rotate them, tile by tile.

Without gradients in the sample H is E[qqᵀ] of the queries that read a head, for values the identity. Every head then
counts the same, because only directions are known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import mlx.core as mx
import numpy as np

from veloxlab.checks import Check, check_fields, real, whole
from veloxlab.codecs import fisherquant_fitting as fitting
from veloxlab.codecs.base import Code, Codec, Sample, check_heads, check_vectors, not_fitted
from veloxlab.codecs.fisherquant_fitting import Axes, CentreName, MetricName
from veloxlab.codecs.fisherquant_planning import planned, rows_of, variances_of
from veloxlab.codecs.method import Method, Prediction, Tensor
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.packing import WIDEST, Layout, Row
from veloxlab.codecs.parts.rope import Rope, Start, angles_from, by_angles
from veloxlab.codecs.parts.trellis import CodeName, TrellisRows, Widths, levels_of
from veloxlab.errors import InputError
from veloxlab.kernels.checked import computed
from veloxlab.kernels.readers import TrellisReader

_ENTRIES = Check("256 or 1024", lambda value: value in (256, 1024), int)


@dataclass(frozen=True, eq=False)
class FisherQuant(Codec):
    """FisherQuant of keys or values; see the module. ``bits`` are true bits a value, as the mean of the whole model.

    Learned: ``forward`` ``[H, D, D]`` to unit coordinates, with ``y = x @ forward / size``; ``backward`` from them;
    ``mean`` ``[H, D]``, before RoPE if there is ``rope``; ``variances`` σ² ``[H, D]``; ``widths``, the bits of each
    coordinate of each head.
    """

    expand_scales = True
    reaches_by = "basis='before_rope'"
    head_dim: int
    bits: float
    tensor: Tensor
    code: CodeName = "trellis"
    entries: int = 256
    basis: Literal["after_rope", "before_rope"] = "after_rope"
    positions: int = 8192
    metric: MetricName = "fisher"
    centre: CentreName = "rotated"
    planning: Literal["model", "head", "none"] = "model"
    scale: Literal["outliers", "none"] = "outliers"
    widths: Widths = ()
    size: float = 1.0
    forward: mx.array | None = None
    backward: mx.array | None = None
    mean: mx.array | None = None
    variances: mx.array | None = None
    rope: Rope | None = None

    def __post_init__(self) -> None:
        self._check()
        check_fields(self, bits=real(least=1, most=WIDEST), entries=_ENTRIES, positions=whole(1))

    @property
    def layout(self) -> Layout:
        return {"codes": Row(mx.uint32, self._rows.words, joint=True)}

    @property
    def head_plans(self) -> Widths:
        return self.widths

    @property
    def bits_per_value(self) -> float:
        return 32 * self._rows.words / (len(self.widths) * self.head_dim)

    @property
    def code_dim(self) -> int:
        """D; for keys with a mean before RoPE, D more for a cosine and a sine of each pair."""
        return self.head_dim * (1 if self._turning is None else 2)

    @property
    def _turning(self) -> Rope | None:
        """The rotary embedding that rotates the mean, for codes after RoPE."""
        return self.rope if self.basis == "after_rope" else None

    @property
    def _undone(self) -> Rope | None:
        """The rotary embedding that is undone before keys are coded, and applied when they are expanded."""
        return self.rope if self.basis == "before_rope" else None

    def heads_of(self, code: Code) -> int:
        return len(self.widths)

    def fit(self, sample: Sample) -> Self:
        """Learn metric, ranges, means and bits of these heads; raises `InputError` below D tokens that vary."""
        check_vectors(sample.x, self.head_dim)
        with_rope = replace(self, rope=sample.rope if self.tensor == "keys" else None)
        turning, sample = with_rope._turning, with_rope._as_coded(sample)
        axes, size = fitting.learned(sample, turning, self.positions, METHOD.name)
        fitted = replace(with_rope, size=size, metric="fisher", centre="rotated")._with(axes)
        return fitted._planned_alone(metric=self.metric, centre=self.centre)

    def reach(self, seen: int) -> int | None:
        after = self.tensor == "keys" and self.basis == "after_rope"
        return max(self.positions, min(seen, fitting.POSITIONS)) if after else None

    def _as_coded(self, sample: Sample) -> Sample:
        """The sample in float32, before RoPE if keys are coded there, and without queries for values."""
        rope, x, queries = self._undone, sample.x.astype(mx.float32), sample.queries if self.tensor == "keys" else None
        if rope is None:
            return replace(sample, x=x, queries=queries)
        gradients, queries = (
            None if own is None else rope.inverse(own, sample.start) for own in (sample.gradients, queries)
        )
        return replace(sample, x=rope.inverse(x, sample.start), gradients=gradients, queries=queries)

    def _with(self, axes: Axes) -> Self:
        """The codec with other axes."""
        unit = constant(axes.forward / fitting.deviations(axes.variances)[:, None] * self.size, mx.float16)
        back = constant(np.linalg.inv(np.array(unit, np.float64)), mx.float16)  # of the rounded matrix
        return replace(self, forward=unit, backward=back, mean=constant(axes.mean), variances=constant(axes.variances))

    def switched(self, **options: Any) -> Self:
        """The codec with other ``options``; raises `InputError` if these need another fit."""
        asked = replace(self, widths=(), **options)
        for name in ("basis", "positions"):
            had, wanted = vars(self)[name], vars(asked)[name]
            if had != wanted:
                said = f"These codecs were fitted with {name}={had!r}, and not with {name}={wanted!r}"
                raise InputError(f"{said}: calibrate with {name}={wanted!r}.")
        if (self.metric, self.centre) == (asked.metric, asked.centre):
            return asked
        if (self.metric, self.centre) != ("fisher", "rotated"):
            said = f"metric={self.metric!r} and centre={self.centre!r} were given to the fit"
            raise InputError(f"{said}: fit without these options, and give them when a cache is made.")
        unit, variances, mean = (np.array(x, np.float64) for x in (self.forward, self.variances, self.mean))
        axes = Axes(unit * fitting.deviations(variances)[:, None] / self.size, variances, mean)
        moved = asked._with(fitting.switched(axes, self._turning, asked.metric, asked.centre))
        return moved if asked.centre == "rotated" else replace(moved, rope=self._undone)

    def blank(self, kv_heads: int) -> Self:
        row, eye = mx.ones((kv_heads, self.head_dim)), mx.eye(self.head_dim, dtype=mx.float16)
        matrix = mx.broadcast_to(eye, (kv_heads, *eye.shape))
        return replace(self, forward=matrix, backward=matrix, mean=row, variances=row)._planned_alone()

    def _planned_alone(self, **options: Any) -> Self:
        """With ``options``, and bits planned for these heads alone."""
        (own,) = planned({0: self}, self.bits, **options).values()
        return own  # type: ignore[return-value]  # of the same class

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        forward, _, mean = self._fitted(x.shape[1])
        x = x.astype(mx.float32) if self._undone is None else self._undone.inverse(x.astype(mx.float32), start)
        mean = mean[None, :, None]
        if self._turning is not None:
            mean = self._turning.forward(mx.broadcast_to(mean, x.shape), start)
        y = ((x - mean) / self.size) @ forward.astype(mx.float32)
        tokens = mx.flatten(y.swapaxes(1, 2), 2)[:, None]
        return Code(computed(lambda _: self._rows.encoder, self._rows.encode, tokens), start)

    def expand(self, code: Code) -> mx.array:
        y = self._rows.expand(code.arrays["codes"])
        if self._undone is not None:
            return self._undone.forward(self._decoded(y + self._shifts[:, None]), code.start)
        if self._turning is None:
            return y + self._shifts[:, None]
        first = (self._orders[1] < self.head_dim // 2).astype(mx.float32)  # 1 at the first coordinate of each pair
        first = mx.broadcast_to(first, (1, 1, code.tokens, self.head_dim))
        turned = mx.take(self._turning.forward(first, code.start), self._orders[0], axis=-1)
        return mx.concatenate([y, mx.broadcast_to(turned, y.shape)], axis=-1)

    def from_codes(self, y: mx.array) -> mx.array:
        return y if self._undone else self._decoded(y)

    def _decoded(self, y: mx.array) -> mx.array:
        self._fitted(y.shape[1])
        return y @ self._to_codes.astype(y.dtype).swapaxes(1, 2)

    def query_to_codes(self, q: mx.array) -> mx.array:
        self._fitted(q.shape[1])
        return q if self._undone else q @ self._to_codes

    def reader(self, code: Code) -> TrellisReader | None:
        if self._undone is not None:
            return None
        self._fitted(len(self.widths))
        rows, rope = code.arrays["codes"], self._turning
        angles = None if rope is None else angles_from(rope, self.head_dim, code.start)
        shifts = self._shifts if rope is None else None
        return self._rows.reader(self.code_dim, rows, shifts, angles)

    @property
    def shared_bytes(self) -> int:
        """Bytes of learned arrays, matrices for queries, and bit positions. Levels are shared by the whole process."""
        learned = self.forward, self.backward, self.mean, self.variances, self._rows.windows
        of_queries = 4 * len(self.widths) * self.head_dim**2 * (2 if self.tensor == "keys" else 1)
        return of_queries + sum(array.nbytes for array in learned if array is not None)

    @cached_property
    def _rows(self) -> TrellisRows:
        if not self.widths:
            raise not_fitted(METHOD.name)
        weights = None if self.variances is None else np.array(self.variances, np.float64)
        return TrellisRows(self.widths, levels_of(self.code, self.entries), weights, self.scale == "outliers")

    @cached_property
    def _shifts(self) -> mx.array:
        """The mean in the space of the codes ``[H, D]``."""
        forward, _, mean = self._fitted()
        return constant((mean[:, None] / self.size @ forward.astype(mx.float32))[:, 0])

    @cached_property
    def _orders(self) -> tuple[mx.array, mx.array]:
        """First coordinates of all pairs that RoPE rotates, then the second ones, and the inverse order, ``[D]``."""
        assert self._turning is not None
        order = self._turning.pairs(self.head_dim).T.ravel()
        return constant(order, mx.uint32), constant(np.argsort(order), mx.uint32)

    @cached_property
    def _to_codes(self) -> mx.array:
        """Matrices from queries to the codes' space ``[H, D, code_dim]``, and transposed back; float32."""
        _, backward, mean = self._fitted()
        ours = self.size * np.array(backward, np.float32).swapaxes(1, 2)
        if self._turning is None:
            return constant(ours)
        return constant(np.concatenate([ours, by_angles(self._turning, np.array(mean))], axis=-1))

    def _fitted(self, kv_heads: int | None = None) -> tuple[mx.array, mx.array, mx.array]:
        if self.forward is None or self.backward is None or self.mean is None:
            raise not_fitted(METHOD.name)
        check_heads(len(self.widths), kv_heads or len(self.widths))
        return self.forward, self.backward, self.mean


def build(head_dim: int, bits: float, tensor: Tensor, *, words: int | None = None, **options: Any) -> FisherQuant:
    """FisherQuant for keys or values, to be fitted. ``words`` is an option of plans, for `planned`."""
    del words
    return FisherQuant(head_dim, bits, tensor, **options)


METHOD = Method(
    id="fisherquant",
    name="FisherQuant",
    paper="none: see the sources that its module names",
    calibrated=True,
    bits=range(1, 9),
    fractional=True,
    stored="bits by what each coordinate costs the loss, 4 bits for a vector's scale",
    options=("code", "entries", "basis", "positions", "metric", "centre", "planning", "scale", "words"),
    build=build,
    version=8,
    long_texts="fisherquant with basis='before_rope'",
    timed=True,
    planned=planned,
    prediction=Prediction(variances_of, rows_of),
    colour="#1c7c7d",
    mark="diamond",
)
