"""How many tokens are exact and how many are codes, as they come and go: counts alone, of one layer.

`veloxlab.cache.layer` moves tokens by these counts, and `veloxlab.cache.room` tells by them what a cache will hold.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Self

from veloxlab.errors import InputError

BLOCK = 32  # tokens that leave the window together: encoding one at a time would cost a launch per token


def token_count(name: str, count: object) -> int:
    """Give ``count`` as a number of tokens; raises `InputError` unless it is a whole number, 0 or more."""
    try:
        whole = -1 if isinstance(count, bool) else operator.index(count)  # type: ignore[arg-type]
    except TypeError:
        whole = -1
    if whole < 0:
        raise InputError(f"{name}={count!r} is not a number of tokens: give a whole number, 0 or more.")
    return whole


@dataclass(frozen=True)
class Arrival:
    """Where the tokens of one call go, and which ones leave the window for the codes.

    Attributes
    ----------
    to_sinks : the first of them, kept exact.
    gone : those behind, which nothing will see again; with them all tokens before but the sinks.
    from_recent, from_new : tokens to be encoded: the oldest of the window, and the next of this call.
    to_recent : the rest of them, which join the window.
    """

    to_sinks: int
    gone: int
    from_recent: int
    from_new: int
    to_recent: int

    @property
    def to_packed(self) -> int:
        """Tokens to be encoded, which is whole blocks."""
        return self.from_recent + self.from_new


@dataclass(frozen=True)
class Windows:
    """Sinks, window and reach of a layer's cache, in tokens.

    Attributes
    ----------
    sinks : first tokens, kept exact.
    window : newest tokens, kept exact.
    block : tokens that leave the window together.
    most_recent : the most that ever are in the window and wait to leave it.
    reach : tokens behind the sinks that a sliding layer can see; None sees all.
    """

    sinks: int
    window: int
    block: int
    most_recent: int
    reach: int | None

    @classmethod
    def of(cls, sinks: int, window: int, max_size: int | None) -> Self:
        """Those of a cache with ``sinks`` and ``window`` that sees ``max_size`` tokens, or all.

        Whole blocks leave the window, and none that it still covers. In a sliding layer exact tokens are at most half
        of what the layer's own cache would hold.

        Raises
        ------
        InputError : ``sinks`` or ``window`` is no number of tokens, or ``max_size`` leaves no room behind the sinks.
        """
        sinks, window = token_count("sinks", sinks), token_count("window", window)
        if max_size is not None and max_size <= sinks:
            raise InputError(f"max_size={max_size} leaves no room behind sinks={sinks}: give more than that.")
        reach = None if max_size is None else max_size - sinks
        if reach is not None:
            window = min(window, reach // 4)
        block = min(BLOCK, max(1, window))
        return cls(sinks, window, block, window + block - 1, reach)

    def arrival(self, count: int, offset: int, recent: int, *, all_seen: bool) -> Arrival:
        """Where ``count`` tokens go that come after ``offset`` others, of which ``recent`` are in the window.

        With ``all_seen`` attention has what it needs of them, and those that a sliding layer will not see again are
        not stored.
        """
        to_sinks = min(count, max(0, self.sinks - offset))
        gone = 0 if self.reach is None or not all_seen else max(0, count - to_sinks - self.reach)
        left = 0 if gone else recent
        pending = left + count - to_sinks - gone
        to_packed = max(0, pending - self.window) // self.block * self.block
        from_recent = min(to_packed, left)
        from_new = to_packed - from_recent
        return Arrival(to_sinks, gone, from_recent, from_new, count - to_sinks - gone - from_new)

    def leaving(self, packed: int, recent: int) -> int:
        """How many of the oldest tokens behind the sinks are forgotten: of packed ones some together.

        Each time copies the rest.
        """
        if self.reach is None:
            return 0
        over = packed + recent - self.reach
        if over <= 0:
            return 0
        grain = min(BLOCK, max(1, self.reach // 8))
        return over if over > packed else over // grain * grain
