"""Training of CommVQ's tables: hard EM, one residual stage after another, with NumPy.

A stage approximates a vector, read as ``D/2`` complex numbers, by ``C[a] + i·C[b]``. Multiplication by ``i`` is the
quarter turn of every pair, so a complex table ``C`` ``[64, D/2]`` equals the paper's 64 matrices ``[[x, y], [−y, x]]``
for each pair. The M-step is one complex least-squares problem for all pairs, with 64 unknowns each.

The paper's trainer has soft assignments with an annealed temperature, 100 steps and a million vectors for each stage.
This one gets about a thousand vectors: its assignments are hard, and it takes few steps. It adds two vectors for each
one, drawn from a Gaussian with the sample's mean and covariance, so that later stages do not overfit. It takes about
0.05 seconds of one core for each stage and KV head, for 1,024 tokens and D = 64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veloxlab.kernels.checked import by_loop
from veloxlab.progress import may_end

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

ENTRIES = 64  # of a stage's table, N_c' in the paper: indices of six bits
STARTS, ROUNDS = 4, 2  # of the search for (a, b): within 0.02 % of the squared error of trying all 4,096
STEPS = 5  # of EM for each stage; fifteen gain another 1 %
MOST_POINTS = 4096  # of training
_INVENTED = 2  # Gaussian vectors added for each of them
_DIAGONAL = 0.1  # share of the covariance that is only variances
_RIDGE = 1.0  # ridge, as a number of vectors, so that an unused entry is not singular
_PRODUCT = 1 << 18  # multiply-adds of one product: too few for BLAS to use threads, which cost more than they gain


def train_tables(points: Floats, stages: int, order: Indices, seed: int) -> Floats:
    """Tables ``[stages, 64, D]`` of one head, in float16's numbers, for ``points`` ``[N, D]`` of root-mean-square 1.

    ``order`` ``[D]`` are the first coordinates of all pairs (real parts), then the second ones (imaginary parts).
    """
    rng = np.random.default_rng(seed)
    if len(points) > MOST_POINTS:
        points = points[rng.choice(len(points), MOST_POINTS, replace=False)]
    points = np.concatenate([points, _invented(points, _INVENTED * len(points), rng)])
    residual: Floats = np.ascontiguousarray(points[:, order])  # otherwise it is in column order
    tables = np.empty((stages, ENTRIES, len(order)), np.float32)
    for stage in range(stages):
        start = residual[rng.choice(len(residual), ENTRIES, replace=False)]
        table: Floats = (start - _turn(start)) / np.float32(2)  # with a = b, (1 − i)/2 · z approximates z
        a, b = by_loop("descend", _descend, residual, table, np.full(len(residual), -1))
        for _ in range(STEPS - 1):
            may_end()
            a, b = by_loop("descend", _descend, residual, _least_squares(residual, a, b), b)
        tables[stage] = _least_squares(residual, a, b).astype(np.float16)
        table = tables[stage]
        a, b = by_loop("search_sums", _search, residual, table, starts=STARTS, rounds=ROUNDS)
        residual = residual - table[a] - _turn(table)[b]
    return tables[..., np.argsort(order)]


def _turn(x: Floats) -> Floats:
    """``i·x``: every pair (x, y) to (−y, x)."""
    real, imaginary = np.split(x, 2, axis=-1)
    return np.concatenate([-imaginary, real], axis=-1)


def _invented(points: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Gaussian vectors ``[count, D]`` of root-mean-square 1, with the mean and nearly the covariance of ``points``."""
    covariance = np.cov(points.T.astype(np.float64))
    variances = np.diag(np.diag(covariance)) + 1e-6 * np.eye(len(covariance))
    root = np.linalg.cholesky((1 - _DIAGONAL) * covariance + _DIAGONAL * variances).astype(np.float32)
    drawn = _product(rng.standard_normal((count, len(root)), np.float32), root.T) + points.mean(axis=0)
    return np.asarray(drawn / np.sqrt(np.square(drawn).mean(axis=1, keepdims=True)))


def _parts(x: Floats, table: Floats) -> tuple[Floats, Floats, Floats]:
    """‖x − T_a − i·T_b‖² − ‖x‖², as terms in a ``[N, 64]``, in b ``[N, 64]``, and in both ``[64, 64]``."""
    norms, turned = np.square(table).sum(axis=1), _turn(table)
    products = _product(x, np.concatenate([table, turned]).T)
    return norms - 2 * products[:, :ENTRIES], norms - 2 * products[:, ENTRIES:], 2 * table @ turned.T


def _search(x: Floats, table: Floats, starts: int, rounds: int) -> tuple[Indices, Indices]:
    of_a, of_b, of_both = _parts(x, table)
    of_both_t = np.ascontiguousarray(of_both.T)
    likely = np.argpartition(of_a + of_both.mean(axis=1), starts, axis=1)[:, :starts]
    rows = np.arange(len(x))
    best, best_a, best_b = np.full(len(x), np.inf, np.float32), likely[:, 0].copy(), likely[:, 0].copy()
    for start in range(starts):
        a = likely[:, start]
        for _ in range(rounds):
            b = (of_b + of_both[a]).argmin(axis=1)
            given_b = of_a + of_both_t[b]
            a = given_b.argmin(axis=1)
        distance = given_b[rows, a] + of_b[rows, b]
        better = distance < best
        best[better], best_a[better], best_b[better] = distance[better], a[better], b[better]
    return best_a, best_b


def _descend(x: Floats, table: Floats, b: Indices) -> tuple[Indices, Indices]:
    """The best a for each vector's b, then the best b for that a; a negative b stands for the best b alone."""
    of_a, of_b, of_both = _parts(x, table)
    b = np.where(b < 0, of_b.argmin(axis=1), b)
    a = (of_a + np.ascontiguousarray(of_both.T)[b]).argmin(axis=1)
    return a, (of_b + of_both[a]).argmin(axis=1)


def _least_squares(x: Floats, a: Indices, b: Indices) -> Floats:
    """The table that minimises Σ‖x − T_a − i·T_b‖²: ``SᴴS·T = Sᴴx`` for the rows S = e_a + i·e_b."""
    of_a, of_b, together = by_loop("add_up", _add_up, x, a, b, entries=ENTRIES)
    gram = np.diag(together.sum(axis=1) + together.sum(axis=0) + _RIDGE) + 1j * (together - together.T)
    real, imaginary = np.split(of_a - _turn(of_b), 2, axis=1)
    table = np.linalg.solve(gram.astype(np.complex64), real + 1j * imaginary)
    return np.concatenate([table.real, table.imag], axis=1).astype(np.float32)


def _add_up(x: Floats, a: Indices, b: Indices, entries: int) -> tuple[Floats, Floats, Indices]:
    """Sums of the rows of ``x`` by a and by b ``[64, D]``, and the counts of each (a, b) ``[64, 64]``."""
    together = np.bincount(a * entries + b, minlength=entries**2).reshape(entries, entries)
    return _sums(x, a), _sums(x, b), together


def _sums(x: Floats, index: Indices) -> Floats:
    """Sum of the rows of ``x`` ``[N, D]`` at each index: ``[64, D]``."""
    chosen = np.zeros((len(x), ENTRIES), np.float32)
    chosen[np.arange(len(x)), index] = 1
    rows = max(1, _PRODUCT // (ENTRIES * x.shape[1]))
    parts = [chosen[at : at + rows].T @ x[at : at + rows] for at in range(0, len(x), rows)]
    return np.asarray(np.sum(parts, axis=0))


def _product(x: Floats, matrix: Floats) -> Floats:
    rows = max(1, _PRODUCT // matrix.size)
    return np.concatenate([x[at : at + rows] @ matrix for at in range(0, len(x), rows)])
