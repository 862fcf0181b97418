"""The fit of FisherQuant for each KV head: a metric of the loss, axes in which it is the identity, and their ranges.

`switched` derives the axes without one of the parts, to measure its effect: for y = x·F the metric is H = FFᵀ, and the
second moment of x is F⁻ᵀ diag(σ²) F⁻¹.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.learning import check_learnable, damped, per_head
from veloxlab.codecs.parts.rope import Rope

Singles = NDArray[np.float32]
MetricName = Literal["fisher", "pca", "none"]
CentreName = Literal["rotated", "still", "none"]

_DAMPING, _RIDGE = 0.03, 1e-3  # of a metric, and of second moments: the share that is added in every direction
LONGEST = 0.99  # quantile of the gradients' lengths, to which longer ones are shortened
_LOUDEST, _QUIET = 20.0, 0.2  # weights of vectors relative to their mean: the largest, and an offset for all
_MOST_WEIGHT, _LEAST_WEIGHT = 30.0, 0.05  # of one coordinate
_TINY = 1e-8  # least variance relative to the largest of a head: float16 must hold their ratios
POSITIONS = 512  # of a window of text, and for a mean that RoPE rotates
_LATER, _SHARE = 8, 0.15  # later positions of a text, and their weight together


class Axes(NamedTuple):
    """``forward`` ``[H, D, D]`` to y, whose errors all cost the same; σ² of y and the mean of x ``[H, D]``."""

    forward: Floats
    variances: Floats
    mean: Floats


def learned(sample: Sample, rope: Rope | None, positions: int, method: str) -> tuple[Axes, float]:
    """Axes of float32 vectors, about a mean that ``rope`` rotates, and the root-mean-square distance from the mean.

    For ``positions`` see `for_later`. Raises `InputError` below D tokens that vary, with the name of the ``method``.
    """
    plain = sample.x if rope is None else rope.inverse(sample.x, sample.start)
    mean = plain.mean(axis=(0, 2), keepdims=True)
    moved = mean if rope is None else rope.forward(mx.broadcast_to(mean, plain.shape), sample.start)
    about = singles(sample.x - moved)
    check_learnable(about, method, plain.shape[-1])
    gradients = None if sample.gradients is None else singles(sample.gradients)
    forward, backward = bases(about, gradients, metric_of(about, gradients, sample.queries))
    axes = Axes(forward, ranges(about, gradients, forward, backward), np.array(mean[0, :, 0], np.float64))
    if rope is not None:
        axes = for_later(axes, rope, sample.start + plain.shape[2], positions)
    if gradients is None:  # the importance of heads is not known
        total = axes.variances.sum(axis=1, keepdims=True)
        axes = Axes(axes.forward / np.sqrt(total)[..., None], axes.variances / total, axes.mean)
    return axes, float(np.sqrt(np.square(about).mean()))


def metric_of(x: Singles, gradients: Singles | None, queries: mx.array | None) -> Floats:
    """The metric of errors in vectors ``x`` ``[H, N, D]``, a matrix for each head ``[H, D, D]``."""
    if gradients is None and queries is None:
        return np.broadcast_to(np.eye(x.shape[-1]), (len(x), x.shape[-1], x.shape[-1]))
    asked = singles(queries).reshape(len(x), -1, x.shape[-1]) if gradients is None else shortened(gradients)  # type: ignore[arg-type]
    return damped(_products(asked, asked) / asked.shape[1], _DAMPING)


def shortened(gradients: Singles) -> Singles:
    """Vectors ``[H, N, D]``, the longest shortened to a quantile, so that a few tokens do not dominate the metric."""
    lengths = np.linalg.norm(gradients, axis=-1, keepdims=True)
    most = np.quantile(lengths, LONGEST, axis=1, keepdims=True).astype(np.float32)
    return np.asarray(gradients * np.minimum(1, most / _nonzero(lengths)))


def bases(x: Singles, gradients: Singles | None, metric: Floats) -> tuple[Floats, Floats]:
    """Matrices ``[H, D, D]`` to coordinates whose errors cost the same, by ascending variance, and from them."""
    weights = np.ones(x.shape[:2], np.float32)
    if gradients is not None:
        squares = np.square(gradients).sum(axis=-1)
        weights = np.minimum(squares / _nonzero(squares.mean(axis=1, keepdims=True)), _LOUDEST) + _QUIET
    moment = _products(x * weights[..., None], x) / weights.sum(axis=1)[:, None, None]
    lower = np.linalg.cholesky(metric)
    vectors = np.linalg.eigh(np.swapaxes(lower, 1, 2) @ damped(moment, _RIDGE) @ lower).eigenvectors
    return lower @ vectors, np.linalg.solve(np.swapaxes(lower, 1, 2), vectors).swapaxes(1, 2)


def ranges(x: Singles, gradients: Singles | None, forward: Floats, backward: Floats) -> Floats:
    """Mean squares ``[H, D]`` of coordinates of ``x``, weighted by the squared gradients of each, within bounds."""
    squares = np.square(x @ forward.astype(np.float32))
    if gradients is None:
        return np.asarray(squares.mean(axis=1), np.float64)
    weights = np.square(gradients @ backward.swapaxes(1, 2).astype(np.float32))
    mean = _nonzero(weights.mean(axis=1, keepdims=True))
    weights = np.minimum(weights, _MOST_WEIGHT * mean) + _LEAST_WEIGHT * mean
    return np.asarray((weights * squares).sum(axis=1) / weights.sum(axis=1), np.float64)


def singles(x: mx.array) -> Singles:
    """``[B, H, S, D]`` to ``[H, B·S, D]`` in float32, which takes half the time of float64."""
    array = np.array(x.astype(mx.float32)).swapaxes(0, 1)
    return np.asarray(array.reshape(array.shape[0], -1, array.shape[-1]))


def _products(a: Singles, b: Singles) -> Floats:
    return np.asarray(np.swapaxes(a, 1, 2) @ b, np.float64)


def _nonzero(x: NDArray[Any]) -> Any:  # noqa: ANN401 - an array of the same type
    return np.where(x == 0, x.dtype.type(1), x)


def switched(axes: Axes, rope: Rope | None, metric: MetricName, centre: CentreName) -> Axes:
    """The same with another metric, or about another mean: see the options of FisherQuant."""
    forward, _, mean = axes
    moment, cost = _moments(axes)
    if centre != "rotated":
        turned = mx.broadcast_to(mx.array(mean, mx.float32)[None, :, None], (1, len(mean), POSITIONS, mean.shape[-1]))
        means = per_head(turned if rope is None else rope.forward(turned, 0))
        mean = means.mean(axis=1) if centre == "still" else np.zeros_like(mean)
        off = means - mean[:, None]
        moment = moment + np.swapaxes(off, 1, 2) @ off / POSITIONS
    if metric != "fisher":
        cost = np.eye(mean.shape[-1]) * np.trace(cost, axis1=1, axis2=2)[:, None, None] / mean.shape[-1]
    if metric == "none":
        forward = np.sqrt(cost)
        return Axes(forward, np.diagonal(cost, axis1=1, axis2=2) * np.diagonal(moment, axis1=1, axis2=2), mean)
    return _axes_of(moment, cost, mean)


def for_later(axes: Axes, rope: Rope, seen: int, positions: int) -> Axes:
    """Axes for keys of up to ``positions`` positions, from those of keys after RoPE at the first ``seen`` ones.

    A model's predictions do not depend on where a text begins, so the moments of later positions are these, rotated.
    """
    if positions <= seen:
        return axes
    own = _moments(axes)
    identity, later = mx.eye(axes.mean.shape[-1])[None, :, None], [np.zeros_like(own[0]) for _ in own]
    for shift in np.geomspace(seen, positions, _LATER).astype(int).tolist():
        turn = np.array(rope.forward(identity, shift)[0, :, 0], np.float64)
        later = [total + turn.T @ matrix @ turn / _LATER for total, matrix in zip(later, own, strict=True)]
    moment, cost = ((1 - _SHARE) * here + _SHARE * there for here, there in zip(own, later, strict=True))
    return _axes_of(moment, cost, axes.mean)


def _moments(axes: Axes) -> tuple[Floats, Floats]:
    """Second moment of vectors, and metric, of each head ``[H, D, D]``."""
    back = np.linalg.inv(axes.forward)
    moment = np.swapaxes(back, 1, 2) @ (axes.variances[..., None] * back)
    return moment, axes.forward @ np.swapaxes(axes.forward, 1, 2)


def _axes_of(moment: Floats, cost: Floats, mean: Floats) -> Axes:
    lower = np.linalg.cholesky(cost)
    found = np.linalg.eigh(np.swapaxes(lower, 1, 2) @ moment @ lower)
    return Axes(lower @ found.eigenvectors, found.eigenvalues, mean)


def deviations(variances: Floats) -> Floats:
    """Square roots of variances, with a positive lower limit."""
    return np.asarray(np.sqrt(np.maximum(variances, _TINY * variances.max(axis=1, keepdims=True))))
