"""Train the levels of bitshift trellises on Gaussians: ``python -m tests.train_trellis`` writes ``data/trellis.npz``.

Each table takes some seconds. Numbers are drawn from fixed seeds, so the same loops give the same file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from veloxlab.codecs.parts.trellis import FILE, TRAINED, reversed_bits
from veloxlab.kernels.cpu.trellis import strings
from veloxlab.texts import shipped_folder

DIM, VECTORS, TESTED = 128, 500, 4000
ROUNDS, STARTS = 40, 6
NOISE = 0.05  # on the levels of the first rounds, to leave local optima near the start
Levels = NDArray[np.float32]


def started(width: int, states: int, rng: np.random.Generator) -> Levels:
    """Return start levels: for each state before the new bits, quantiles of a Gaussian with another offset."""
    rest = states >> width
    places = np.arange(1 << width) + rng.permutation(rest)[:, None] / rest
    return np.asarray(norm.ppf(np.clip((places / (1 << width)) + 0.5 / states, 1e-4, 1 - 1e-4)).ravel(), np.float32)


def states_of(x: Levels, width: int, levels: Levels) -> NDArray[np.int64]:
    """Return the states of the best strings of vectors ``[N, D]``."""
    table, states = np.zeros((width + 1, len(levels)), np.float32), np.empty(x.shape, np.int64)
    table[width] = levels
    strings(0, len(x), x, np.full(x.shape[1], width, np.int64), table, states)
    return states


def lost(width: int, levels: Levels, seed: int = 99, count: int = TESTED) -> float:
    """Return the mean squared error on Gaussians that no level was trained on."""
    x = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return float(np.square(x - levels[states_of(x, width, levels)]).mean(dtype=np.float64))


def trained(width: int, states: int, seed: int) -> Levels:
    """Return levels of states, the newest bits lowest: each is repeatedly set to the mean of its values."""
    rng = np.random.default_rng(seed)
    levels = started(width, states, rng)
    for turn in range(ROUNDS):
        x = rng.standard_normal((VECTORS, DIM)).astype(np.float32)
        found = states_of(x, width, levels).ravel()
        count, total = np.bincount(found, minlength=states), np.bincount(found, x.ravel(), states)
        levels = np.where(count > 0, total / np.maximum(count, 1), levels).astype(np.float32)
        if turn < ROUNDS - 10:
            left = 1 - turn / ROUNDS
            levels += rng.standard_normal(states).astype(np.float32) * np.float32(NOISE * left * left)
    return levels.astype(np.float16).astype(np.float32)


def main() -> None:
    """Train from several starts, and keep the best one on a separate set of Gaussians."""
    arrays = {}
    for states in (256, 1024):
        found = []
        for width in range(1, TRAINED + 1):
            tried = [trained(width, states, seed) for seed in range(STARTS)]
            found.append(min(tried, key=lambda levels: lost(width, levels, 98, 1000)))
        errors = [lost(width, levels) for width, levels in enumerate(found, 1)]
        print(states, [round(error, 5) for error in errors])
        newest_highest = np.stack(found)[:, reversed_bits(states.bit_length() - 1)]
        arrays |= {f"levels_{states}": newest_highest.astype(np.float16), f"distortion_{states}": np.array(errors)}
    np.savez(shipped_folder("data") / FILE, **arrays)


if __name__ == "__main__":
    main()
