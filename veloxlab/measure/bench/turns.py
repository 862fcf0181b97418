"""Times of decoded tokens of several caches, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.llama import Model

from veloxlab.measure.bench.timing import Tell, spread

Maker = Callable[[], list[Any]]  # of a cache for each layer
_TURN = 32  # tokens of a cache before another one's turn: one block leaves the window meanwhile
_TURNS = 3
_FIRST = 40  # tokens before the timed ones: one block, so that every kernel is compiled


@dataclass(eq=False)
class Decoding:
    """A text that one cache decodes."""

    model: Model
    caches: list[Any]
    token: mx.array  # of each sequence

    def seconds(self, count: int) -> list[float]:
        """Return seconds from token to token; each goes to the GPU while the one before is still computed.

        A first token, which waits for none before, is not timed.
        """
        spent = []
        mx.synchronize()
        for _ in range(1 + count):
            start = time.perf_counter()
            following = mx.argmax(self.model(self.token, cache=self.caches)[:, -1:], axis=-1)
            mx.async_eval(following)
            mx.eval(self.token)
            spent.append(time.perf_counter() - start)
            self.token = following
        mx.eval(self.token)
        return spent[1:]


class Times(NamedTuple):
    """Times of tokens: median and slowest in seconds, the median's ratio to the first cache's, and `spread`; bytes."""

    typical: float
    slowest: float
    ratio: float
    held_bytes: int
    spread: float


def in_turn(model: Model, made: Mapping[str, Maker], runs: int, progress: Tell, sequences: int = 1) -> dict[str, Times]:
    """Return the times of each cache: medians over ``runs``.

    Caches decode `_TURN` tokens in turn, because a processor's speed can double from one second to the next. A ratio is
    the median over all turns.
    """
    found: dict[str, list[list[list[float]]]] = {name: [] for name in made}  # by run and turn
    held: dict[str, int] = {}
    for _ in range(runs):
        decoding: dict[str, Decoding] = {}
        for name in [*found]:
            of_cache = Decoding(model, made[name](), mx.array([[1]] * sequences))
            try:
                of_cache.seconds(_FIRST)
            except RuntimeError as error:
                # MLX 0.32.4 on CUDA has no product of one row with quantized ones for some numbers of tokens
                progress(f"{name} fails: {error}")
                del found[name]
                continue
            decoding[name] = of_cache
            found[name].append([])
        for _ in range(_TURNS):
            for name, of_cache in decoding.items():
                found[name][-1].append(of_cache.seconds(_TURN))
        held |= {name: sum(cache.nbytes for cache in each.caches) for name, each in decoding.items()}
        del decoding, of_cache
        mx.clear_cache()
    first = next(iter(found.values()))
    return {name: _of_runs(timed, first, held[name]) for name, timed in found.items()}


def _of_runs(seconds: list[list[list[float]]], first: list[list[list[float]]], held_bytes: int) -> Times:
    """Return the times of a cache by run and turn, beside those of the first one."""
    runs = [[*chain(*turns)] for turns in seconds]
    typical = statistics.median(statistics.median(run) for run in runs)
    slowest = max(statistics.median(token) for token in zip(*runs, strict=True))
    medians, of_first = ([statistics.median(turn) for turn in chain(*each)] for each in (seconds, first))
    ratio = statistics.median(own / other for own, other in zip(medians, of_first, strict=True))
    return Times(typical, slowest, ratio, held_bytes, statistics.median(spread(run) for run in runs))
