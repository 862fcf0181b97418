"""A race for the Pareto front of bytes and divergence. All entrants run on one window of text after another, and an
entrant that is significantly worse than another stops.

Racing by intervals of paired differences is as in O. Maron and A. Moore, *Hoeffding Races*, NIPS 1993; the intervals
here are Student's t. Nothing is loaded or measured here: numbers come from a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from veloxlab.measure.experiments import lower_ends

State = Literal["front", "close", "dominated", "above floor", "not needed", "not finite", "over budget"]
Measure = Callable[[Sequence[int], int], Sequence[float]]

LEAST_WINDOWS = 3  # before an entrant is dropped: two may agree by chance
GROUP = 8  # entrants that run together under a floor: cheaper groups first


@dataclass
class Entrant:
    """An entrant of the race: its cost, and its KL in nats on each window that it ran on.

    Its state is ``"front"``: nothing else is as cheap and as close to the exact model; ``"close"``: beaten on average,
    but not significantly; ``"dominated"``: significantly beaten by one that costs no more; ``"above floor"``: its
    divergence is above the limit; ``"not needed"``: cheaper ones meet the limit; ``"not finite"``: its predictions; or
    ``"over budget"``: it did not run.
    """

    nbytes: float
    kls: list[float] = field(default_factory=list)
    state: State = "not needed"

    @property
    def mean_kl(self) -> float:
        """Over its windows; infinite if it did not run, or its predictions are not finite."""
        return float(np.mean(self.kls)) if self.kls and np.isfinite(self.kls).all() else float("inf")


def race(
    nbytes: Sequence[float], measure: Measure, windows: int, most_kl: float | None = None, confidence: float = 0.95
) -> tuple[Entrant, ...]:
    """Run entrants of these costs on windows 0, 1, … and drop after each window those that are significantly beaten.

    ``measure`` returns the KL of the entrants with these numbers on a window. An entrant is significantly beaten if
    another costs no more, and the confidence interval of the windows' differences of KL lies above zero. Each
    comparison gets an equal share of 1 − ``confidence``, so this is the most that all wrong drops together can reach.

    With ``most_kl`` the cheapest run first, `GROUP` at a time, and the race ends with the first group in which an
    entrant has a mean divergence of at most ``most_kl``.
    """
    entrants = tuple(Entrant(n) for n in nbytes)
    look = 1 - (1 - confidence) / max(1, windows - LEAST_WINDOWS + 1)
    order = sorted(range(len(entrants)), key=lambda i: entrants[i].nbytes)
    size = len(order) if most_kl is None else GROUP
    for start in range(0, len(order), size):
        alive = sorted(order[start : start + size])
        for window in range(windows):
            if not alive:
                break
            for i, kl in zip(alive, measure(alive, window), strict=True):
                entrants[i].kls.append(kl)
            alive = _survivors(entrants, alive, most_kl, look)
        met = [entrants[i] for i in alive if most_kl is None or entrants[i].mean_kl <= most_kl]
        for i in alive:
            entrants[i].state = "above floor"
        for entrant, front in zip(met, on_front([e.nbytes for e in met], [e.mean_kl for e in met]), strict=True):
            entrant.state = "front" if front else "close"
        if met and most_kl is not None:
            break
    return entrants


def on_front(nbytes: Sequence[float], kls: Sequence[float]) -> list[bool]:
    """Whether each point is on the Pareto front: no other point is as small in both, and smaller in one."""
    cost, loss = np.asarray(nbytes), np.asarray(kls)
    no_more = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    less = (cost[:, None] < cost) | (loss[:, None] < loss)
    return [not beaten for beaten in np.any(no_more & less, axis=0)]


def _survivors(
    entrants: Sequence[Entrant], alive: Sequence[int], most_kl: float | None, confidence: float
) -> list[int]:
    for i in alive:
        if not np.isfinite(entrants[i].kls[-1]):
            entrants[i].state = "not finite"
    finite = [i for i in alive if entrants[i].state != "not finite"]
    kls = np.array([entrants[i].kls for i in finite])  # [N, windows]
    if kls.ndim < 2 or kls.shape[1] < LEAST_WINDOWS:
        return finite
    cost = np.array([entrants[i].nbytes for i in finite])
    beaten = np.any((cost <= cost[:, None]) & (lower_ends(kls[:, None] - kls, confidence) > 0), axis=1)
    above = lower_ends(kls, confidence) > (np.inf if most_kl is None else most_kl)
    for i, is_beaten, is_above in zip(finite, beaten, above, strict=True):
        if is_beaten or is_above:
            entrants[i].state = "above floor" if is_above else "dominated"
    return [i for i, out in zip(finite, beaten | above, strict=True) if not out]
