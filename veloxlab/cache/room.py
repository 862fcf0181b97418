"""How many tokens a cache's buffers have room for after a text: ours, and mlx-lm's own. Counts alone, no arrays.

Buffers grow in steps and with slack, so what is held depends on how the tokens came: here, as mlx-lm's generator brings
them: a prompt in chunks but for its last token, and then one token after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from veloxlab.cache.counts import Windows
from veloxlab.cache.runs import room

CHUNK = 2048  # tokens of a prompt that mlx-lm reads together
OWN_STEP = 256  # tokens by which mlx-lm's own buffers grow


@dataclass(frozen=True)
class Room:
    """Tokens that the buffers of one layer have room for: exact first ones, packed, and exact recent ones."""

    sinks: int
    packed: int
    recent: int


@dataclass
class _Buffer:
    """Tokens of one buffer, and how many it has room for."""

    tokens: int = 0
    room: int = 0

    def add(self, count: int, most: int | None = None) -> None:
        """Append tokens to a buffer that holds ``most`` at most."""
        if count:
            self.tokens += count
            self.room = room(self.room, self.tokens, count, most)

    def drop(self, count: int) -> None:
        """Forget the oldest tokens: the rest is copied, without room to grow."""
        if count:
            self.room = self.tokens = self.tokens - count


def calls(tokens: int, decoded: int = 0, chunk: int = CHUNK) -> Iterator[int]:
    """Sizes of the calls that bring ``tokens`` tokens, of which the last ``decoded`` were generated.

    Those come one at a time, and so does the last one of the prompt.
    """
    alone = min(tokens, decoded + 1)
    read = tokens - alone
    for start in range(0, read, chunk):
        yield min(chunk, read - start)
    for _ in range(alone):
        yield 1


@lru_cache(maxsize=4096)
def compressed_room(windows: Windows, tokens: int, decoded: int = 0, chunk: int = CHUNK) -> Room:
    """Room of a `CompressedKVCache` after the `calls` of a text, its ``chunk`` being ``"exact"``."""
    sinks, packed, recent, offset = _Buffer(), _Buffer(), _Buffer(), 0
    for count in calls(tokens, decoded, chunk):
        coming = windows.arrival(count, offset, recent.tokens, all_seen=count > windows.window)
        offset += count
        sinks.add(coming.to_sinks, windows.sinks)
        if coming.gone:
            packed.drop(packed.tokens)
            recent.drop(recent.tokens)
        recent.drop(coming.from_recent)
        packed.add(coming.to_packed)
        recent.add(coming.to_recent, windows.most_recent)
        leaving = windows.leaving(packed.tokens, recent.tokens)
        of_packed = min(leaving, packed.tokens)
        packed.drop(of_packed)
        recent.drop(leaving - of_packed)
    return Room(sinks.room, packed.room, recent.room)


@lru_cache(maxsize=4096)
def own_room(tokens: int, decoded: int = 0, max_size: int | None = None, chunk: int = CHUNK) -> int:
    """Room of mlx-lm's ``KVCache`` and ``QuantizedKVCache``, or, with ``max_size``, of its ``RotatingKVCache``."""
    held = before = 0
    for count in calls(tokens, decoded, chunk):
        if max_size is None:
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
