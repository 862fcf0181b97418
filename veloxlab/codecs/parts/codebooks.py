"""Scalar codebooks, computed: the Lloyd–Max levels of one coordinate of a randomly rotated vector.

A vector of ``dim`` coordinates scaled to root-mean-square 1 and rotated at random lies on the sphere of radius √dim.
One coordinate then has the density f(t) ∝ (1 − t²/dim)^((dim − 3)/2) on [−√dim, √dim] (a scaled Beta; TurboQuant,
arXiv 2504.19874, Lemma 1), which tends to N(0, 1). Levels here have that unit variance: divide by √dim for unit ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.packing import BITS
from veloxlab.errors import InputError
from veloxlab.kernels.checked import by_loop

CodebookName = Literal["sphere", "gaussian"]
REACH = 12.0  # standard deviations: the density beyond is below 1e-32
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)


@dataclass(frozen=True)
class Codebook:
    """Ascending levels ``[2**bits]`` for a unit variance, boundaries halfway between them, distortion E(x − x̂)²."""

    levels: Floats
    boundaries: Floats
    distortion: float


def gaussian_codebook(bits: int) -> Codebook:
    """Lloyd–Max for N(0, 1): the limit of large head dimensions."""
    return _lloyd_max(BITS("bits", bits), None)


def sphere_codebook(bits: int, dim: int) -> Codebook:
    """Lloyd–Max for one coordinate of a random point on the sphere of radius √dim, exact for every ``dim``."""
    if dim < 4:
        raise InputError(f"A head dimension of {dim} is too small for a rotated codebook: it takes 4 or more.")
    return _lloyd_max(BITS("bits", bits), dim)


@lru_cache
def _lloyd_max(bits: int, dim: int | None) -> Codebook:
    """Newton's method on both of Lloyd's conditions: levels are means of cells, boundaries are halfway between."""
    count, reach = 2**bits, reach_of(dim)
    grid = np.linspace(-reach, reach, 20_001)
    # Panter and Dite: at high rate the levels are evenly spaced quantiles of the cube root of the density
    cumulative = np.cumsum(coordinate_density(grid, dim) ** (1 / 3))
    levels = np.interp((np.arange(count) + 0.5) / count, cumulative / cumulative[-1], grid)
    for _ in range(100):
        edges, mass, mean, _ = _cells(levels, dim, reach)
        density = coordinate_density(edges, dim)
        below = density[:-1] * (mean - edges[:-1]) / mass / 2  # an edge moves by half of each level beside it
        above = density[1:] * (edges[1:] - mean) / mass / 2
        below[0] = above[-1] = 0.0  # the outer edges do not move
        jacobian = np.diag(1 - below - above) - np.diag(below[1:], -1) - np.diag(above[:-1], 1)
        step = np.linalg.solve(jacobian, levels - mean)
        # a damped step keeps the levels in order; close to the optimum it is Newton's own
        gap = np.diff(levels, prepend=-reach, append=reach).min()
        levels = levels - step * min(1.0, 0.4 * gap / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-12:
            break
    levels = (levels - levels[::-1]) / 2  # the density is even, and so is the optimum
    edges, _, _, errors = _cells(levels, dim, reach)
    return Codebook(levels, edges[1:-1], float(errors.sum()))


def reach_of(dim: int | None) -> float:
    """The largest number that `coordinate_density` of ``dim`` is tabulated for."""
    return REACH if dim is None else min(REACH, math.sqrt(dim))


def coordinate_density(t: Floats, dim: int | None) -> Floats:
    """Density of one coordinate of unit variance: on the sphere in ``dim`` dimensions, or N(0, 1) for None."""
    if dim is None:
        return np.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    log_norm = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - 0.5 * math.log(math.pi * dim)
    inside = np.clip(1 - t * t / dim, 0.0, None)
    return np.asarray(math.exp(log_norm) * inside ** ((dim - 3) / 2))


def _cells(levels: Floats, dim: int | None, reach: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Edges of all cells, and the mass, mean and squared error of each, by Gauss–Legendre quadrature."""
    edges = np.concatenate([[-reach], (levels[1:] + levels[:-1]) / 2, [reach]])
    half, middle = np.diff(edges)[:, None] / 2, (edges[1:] + edges[:-1])[:, None] / 2
    t = middle + half * _NODES
    weight = half * _WEIGHTS * coordinate_density(t, dim)
    mass = weight.sum(axis=1)
    return edges, mass, (weight * t).sum(axis=1) / mass, (weight * (t - levels[:, None]) ** 2).sum(axis=1)


_GRID = 2**16  # cells of a tabulated density
_ROUNDS = 2_000  # of Lloyd's iteration; from this start 256 levels need some hundreds
STARTS = (1 / 3, 1 / 2, 1.0)  # powers of the density whose quantiles are first levels; a third is Panter and Dite's


def lloyd_max(
    density: Callable[[Floats], Floats], low: float, high: float, bits: int, starts: Sequence[float] = STARTS
) -> Codebook:
    """Lloyd–Max for any ``density`` on ``[low, high]``, not normalized: the best optimum of a few ``starts``."""
    t = np.linspace(low, high, _GRID + 1)
    f = density(t)
    return min((_lloyd(t, f, bits, power) for power in starts), key=lambda found: found.distortion)


def _lloyd(t: Floats, f: Floats, bits: int, power: float) -> Codebook:
    """Lloyd's iteration for density ``f`` at ``t``, from the quantiles of ``f**power`` (1/3: Panter and Dite's)."""
    mass, first = (_integral(g, t) for g in (f, f * t))
    start = np.cumsum(f**power)
    levels = np.interp((np.arange(2**bits) + 0.5) / 2**bits, start / start[-1], t)
    # an iteration removes a fiftieth or less of the remaining error: at 4 bits levels are then right to a few 1e-6
    least = np.array([1e-10 * (t[-1] - t[0])])
    (levels,) = by_loop("settled_levels", _settled, levels, t, mass, first, least, trial=_trial(), rounds=_ROUNDS)
    boundaries = (levels[1:] + levels[:-1]) / 2
    error = f * (t - levels[np.searchsorted(boundaries, t)]) ** 2
    return Codebook(levels, boundaries, float(_integral(error, t)[-1] / mass[-1]))


def _settled(levels: Floats, t: Floats, mass: Floats, first: Floats, least: Floats, rounds: int) -> tuple[Floats]:
    """Move levels to the means of their cells until none moves by ``least``; integrals at even steps ``t``."""
    for _ in range(rounds):
        edges = np.concatenate([t[:1], (levels[1:] + levels[:-1]) / 2, t[-1:]])
        inside = np.diff(np.interp(edges, t, mass))
        means = np.diff(np.interp(edges, t, first)) / np.where(inside > 0, inside, 1.0)
        step = np.where(inside > 0, means - levels, 0.0)
        levels = levels + step
        if np.abs(step).max() < least:
            break
    return (levels,)


def _trial() -> tuple[Floats, ...]:
    """The inputs of a trial: a density that is 0 at first, where a level stays, and then rises."""
    t = np.linspace(-1.0, 2.0, 49)
    f = np.maximum(t, 0.0)
    return np.array([-0.9, -0.5, 1.0, 1.9]), t, _integral(f, t), _integral(f * t, t), np.array([1e-9])


def _integral(f: Floats, t: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum((f[1:] + f[:-1]) * np.diff(t) / 2)])
