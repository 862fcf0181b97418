"""A race for the Pareto front of bytes and divergence: all run on one window of text after another, and who is surely
beaten stops.

Racing by confidence intervals of paired differences on the same windows is as in O. Maron and A. Moore, *Hoeffding
Races*, NIPS 1993; the intervals here are Student's t. Nothing is loaded or measured here: numbers come from a callback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from veloxlab.measure.intervals import lower_ends

State = Literal["front", "close", "dominated", "above floor", "not needed", "not finite"]
Measure = Callable[[Sequence[int], int], Sequence[float]]
Floats = npt.NDArray[np.float64]

LEAST_WINDOWS = 3  # before anyone is dropped: two may agree by chance
GROUP = 8  # entrants that run together under a floor: cheaper groups first


@dataclass
class Entrant:
    """One that races.

    Attributes
    ----------
    nbytes : what it costs, known before.
    kls : of each window that it ran on, in their order; nats.
    state : ``"front"``: nothing else is as cheap and as close to the exact model; ``"close"``: beaten on average, but
        not surely; ``"dominated"``: surely beaten by one that costs no more; ``"above floor"``: it diverges by more
        than was allowed; ``"not needed"``: cheaper ones meet the floor; ``"not finite"``: its predictions are not.
    """

    nbytes: float
    kls: list[float] = field(default_factory=list)
    state: State = "not needed"

    @property
    def mean_kl(self) -> float:
        """Over its windows; infinite if it did not run, or its predictions are not finite."""
        return float(np.mean(self.kls)) if self.kls and np.isfinite(self.kls).all() else float("inf")


def race(
    nbytes: Sequence[float],
    measure: Measure,
    windows: int,
    *,
    most_kl: float | None = None,
    confidence: float = 0.95,
) -> tuple[Entrant, ...]:
    """Run entrants on windows 0, 1, … together, and drop after each those that are surely beaten.

    Surely beaten: another costs no more, and the interval of the windows' differences of KL lies above zero. Every
    look at the numbers gets an equal share of 1 − ``confidence``, so that the chance to drop one wrongly against
    another that is no better is below it, over all looks together.

    Parameters
    ----------
    nbytes : what each costs.
    measure : gives the KL of some entrants, by their numbers, on a window.
    windows : how many there are.
    most_kl : a quality floor. The cheapest run first, `GROUP` together, and the race ends with the first group in which
        one diverges by no more than this on average.
    confidence : of the intervals.
    """
    entrants = tuple(Entrant(n) for n in nbytes)
    look = 1 - (1 - confidence) / max(1, windows - LEAST_WINDOWS + 1)
    order = sorted(range(len(entrants)), key=lambda i: entrants[i].nbytes)
    for group in [order] if most_kl is None else _groups(order):
        alive = sorted(group)
        for window in range(windows):
            if not alive:
                break
            for i, kl in zip(alive, measure(alive, window), strict=True):
                entrants[i].kls.append(kl)
            alive = _survivors(entrants, alive, most_kl, look)
        _judge(entrants, alive, most_kl)
        if most_kl is not None and any(entrants[i].state == "front" for i in group):
            break
    return entrants


def on_front(nbytes: Sequence[float], kls: Sequence[float]) -> list[bool]:
    """Whether nothing else has no more of both, and less of one."""
    cost, loss = np.asarray(nbytes), np.asarray(kls)
    no_more = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    less = (cost[:, None] < cost) | (loss[:, None] < loss)
    beaten = np.any(no_more & less, axis=0)
    return [not b for b in beaten.tolist()]


def _groups(order: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), GROUP):
        yield order[start : start + GROUP]


def _survivors(
    entrants: Sequence[Entrant], alive: Sequence[int], most_kl: float | None, confidence: float
) -> list[int]:
    """Those of ``alive`` that are not surely out after the last window."""
    finite = []
    for i in alive:
        if np.isfinite(entrants[i].kls[-1]):
            finite.append(i)
        else:
            entrants[i].state = "not finite"
    kls = np.array([entrants[i].kls for i in finite])  # [N, windows]
    if kls.ndim < 2 or kls.shape[1] < LEAST_WINDOWS:
        return finite
    beaten = _surely_beaten(np.array([entrants[i].nbytes for i in finite]), kls, confidence)
    above = np.zeros(len(finite), bool) if most_kl is None else lower_ends(kls, confidence) > most_kl
    for i, is_beaten, is_above in zip(finite, beaten, above, strict=True):
        if is_beaten or is_above:
            entrants[i].state = "above floor" if is_above else "dominated"
    return [i for i, out in zip(finite, beaten | above, strict=True) if not out]


def _surely_beaten(nbytes: Floats, kls: Floats, confidence: float) -> npt.NDArray[np.bool_]:
    """Which ``[N]`` are beaten by another that costs no more."""
    beaten = np.zeros(len(nbytes), bool)
    for other, cost in enumerate(nbytes):
        beaten |= (cost <= nbytes) & (lower_ends(kls - kls[other], confidence) > 0)
    return beaten


def _judge(entrants: Sequence[Entrant], finishers: Sequence[int], most_kl: float | None) -> None:
    """Tell the states of those that ran on every window."""
    means = {i: entrants[i].mean_kl for i in finishers}
    for i, mean in means.items():
        if most_kl is not None and mean > most_kl:
            entrants[i].state = "above floor"
    left = [i for i in finishers if most_kl is None or means[i] <= most_kl]
    for i, front in zip(left, on_front([entrants[i].nbytes for i in left], [means[i] for i in left]), strict=True):
        entrants[i].state = "front" if front else "close"
