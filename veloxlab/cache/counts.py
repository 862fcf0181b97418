"""Counts of exact and encoded tokens of one layer.

`veloxlab.cache.runs` moves tokens by these counts. Buffers grow in steps, so the held bytes depend on the sizes of
the calls that bring the tokens: `calls` has those of mlx-lm's generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

from veloxlab.checks import whole
from veloxlab.errors import InputError
from veloxlab.kernels.devices import device_backend
from veloxlab.mlxlm.probe import LayerFacts

BLOCK = 32  # tokens that leave the window together: encoding one at a time would cost a launch per token
_APART = 5  # tokens between the blocks of one layer and the next, so that no two of 32 layers encode at the same step
CHUNK = 2048  # tokens of a prompt that mlx-lm reads together
STEP = 8  # tokens by which a buffer grows if they come one at a time,
SLACK_SHARE = 64  # or 1/64 of its size, if that is more: then growth costs O(1) for each token
OWN_STEP = 256  # tokens by which mlx-lm's own buffers grow
TOKENS = whole(0)  # how many tokens


class Arrival(NamedTuple):
    """How many tokens of one call go where, and how many leave the window to be encoded."""

    to_sinks: int  # the first of them, kept exact
    gone: int  # the next, which nothing will see again; then all earlier tokens but the sinks go too
    from_recent: int  # the oldest of the window, to be encoded
    from_new: int  # the next of this call, to be encoded
    to_packed: int  # both: whole blocks, but for the first
    to_recent: int  # the rest, which join the window


class Room(NamedTuple):
    """Tokens that the buffers of one layer have room for: exact first ones, packed, and exact newest ones."""

    sinks: int
    packed: int
    recent: int

    @property
    def exact(self) -> int:
        """The number of exact tokens."""
        return self.sinks + self.recent


@dataclass(frozen=True)
class Windows:
    """Sinks, window and reach of a layer's cache, in tokens."""

    sinks: int  # first tokens, kept exact
    window: int  # newest tokens, kept exact
    block: int  # tokens that leave the window together
    most_recent: int  # the most tokens that are in the window or wait to leave it
    reach: int | None  # tokens after the sinks that a sliding layer can see; None sees all
    less: int = 0  # by how much the first block is smaller

    @classmethod
    def of(cls, sinks: int, window: int, max_size: int | None, layer: int = 0) -> Self:
        """The windows of a cache that sees ``max_size`` tokens, or all; raises `InputError` if only sinks fit.

        In a sliding layer exact tokens are at most half of what the layer's own cache would hold. Layers differ in the
        size of their first block, so that no step has to encode a block of every layer.
        """
        sinks, window = TOKENS("sinks", sinks), TOKENS("window", window)
        if max_size is not None and max_size <= sinks:
            raise InputError(f"max_size={max_size} leaves no room after sinks={sinks}: give more than that.")
        reach = None if max_size is None else max_size - sinks
        if reach is not None:
            window = min(window, reach // 4)
        block = min(BLOCK, max(1, window))
        less = _APART * layer % block if reach is None else 0
        return cls(sinks, window, block, window + block - 1, reach, less)

    @classmethod
    def of_layer(cls, facts: LayerFacts, sinks: int, window: int) -> Self:
        """The windows of a cache that replaces a model's own, whose first tokens a sliding layer keeps."""
        return cls.of(sinks if facts.max_size is None else facts.keep, window, facts.max_size, facts.layer)

    @property
    def early(self) -> int:
        """Recent tokens at which a GPU encodes the next block, which leaves half a block later; 0 for small blocks."""
        return self.most_recent - self.block // 2 if self.block >= STEP else 0

    def arrival(self, count: int, offset: int, recent: int, *, all_seen: bool) -> Arrival:
        """Where ``count`` tokens go after ``offset`` others, of which ``recent`` are in the window.

        With ``all_seen`` tokens that a sliding layer will not see again are not stored: attention has them already.
        """
        to_sinks = min(count, max(0, self.sinks - offset))
        gone = 0 if self.reach is None or not all_seen else max(0, count - to_sinks - self.reach)
        left = 0 if gone else recent
        new = count - to_sinks - gone
        to_packed = self.aged(left + new, first=offset <= self.sinks + recent)
        from_recent = min(to_packed, left)
        from_new = to_packed - from_recent
        return Arrival(to_sinks, gone, from_recent, from_new, to_packed, new - from_new)

    def aged(self, recent: int, *, first: bool) -> int:
        """How many of the oldest of ``recent`` tokens leave the window to be encoded; ``first``: no others did before.

        ``window.h`` is the same for kernels.
        """
        over, less = recent - self.window, self.less if first else 0
        return (over + less) // self.block * self.block - less if over >= self.block else 0

    def leaving(self, packed: int, recent: int) -> int:
        """How many of the oldest tokens after the sinks are dropped."""
        over = 0 if self.reach is None else max(0, packed + recent - self.reach)
        return over if over > packed else over // self._grain * self._grain

    def most_held(self, tokens: int, *, decoded: bool = True) -> Room:
        """The most tokens that a cache has room for after a text, for any sizes of calls.

        Without ``decoded`` they came in one call, and no buffer has slack. This is exact for a layer that does not
        slide.
        """
        behind = tokens if self.reach is None else self.reach + self._grain - 1
        arrival = self.arrival(min(tokens, self.sinks + behind), 0, 0, all_seen=False)
        sinks, packed, recent = arrival.to_sinks, arrival.to_packed, arrival.to_recent
        if decoded:
            sinks = min(sinks + STEP, self.sinks)
            recent = min(recent + window_step(), self.most_recent) if recent else 0
            packed += packed_slack(packed, 1) if packed else 0
        return Room(sinks, packed, recent)

    @property
    def _grain(self) -> int:
        """Packed tokens of a sliding layer that are dropped together, because each drop copies the rest."""
        return min(BLOCK, max(1, (self.reach or 0) // 8))


def window_step() -> int:
    """Tokens by which a window grows if they come one at a time. A GPU takes long for growth compared with a step."""
    return BLOCK if device_backend().lazy else STEP


def packed_slack(tokens: int, new: int) -> int:
    """Room for later tokens in buffers of codes that grow to ``tokens`` when ``new`` ones come.

    A long text gets what it needs. On a GPU slack is at least that of mlx-lm's own buffers.
    """
    if new > BLOCK:
        return 0
    least = OWN_STEP if device_backend().lazy else STEP * (new == 1)
    return max(least, tokens // SLACK_SHARE)


def calls(tokens: int, decoded: int = 0, chunk: int = CHUNK) -> Iterator[int]:
    """Sizes of the calls of a text: the ``decoded`` tokens and the last one of the prompt have calls of their own."""
    alone = min(tokens, decoded + 1)
    for start in range(0, tokens - alone, chunk):
        yield min(chunk, tokens - alone - start)
    for _ in range(alone):
        yield 1


@lru_cache(maxsize=4096)
def own_room(
    tokens: int, decoded: int = 0, max_size: int | None = None, chunk: int = CHUNK, *, chunked: bool = False
) -> int:
    """Tokens that mlx-lm's own cache has room for after `calls`.

    With ``max_size`` it is a ``RotatingKVCache``, or, if ``chunked``, a ``ChunkedKVCache`` of chunks one token shorter.
    """
    held = before = 0
    for count in calls(tokens, decoded, chunk):
        if chunked and max_size is not None and before >= max_size:  # it drops tokens before others come
            held = before = max_size - 1
        if max_size is None or chunked:
            if before + count > held:
                held = (before if before % OWN_STEP else held) + -(-count // OWN_STEP) * OWN_STEP
        elif count > 1:
            held = min(held, max_size - 1) + count
        else:
            if before >= held and held < max_size:
                held += min(OWN_STEP, max_size - before)
            held = min(held, max_size)
        before += count
    return held
