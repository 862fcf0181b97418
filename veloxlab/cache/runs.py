"""The tokens of one layer: sinks, packed ones and recent ones."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

from veloxlab.cache.counts import BLOCK, CHUNK, Arrival, Room, Windows, calls, window_step
from veloxlab.cache.run import Codes, Run
from veloxlab.codecs import Codec, Tensor
from veloxlab.kernels.checked import ahead
from veloxlab.kernels.slide import Slid


class Runs:
    """Three runs of tokens in order: ``sinks``, ``packed`` and ``recent``."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.evicted = windows, 0  # `evicted`: dropped tokens after the sinks
        self.sinks, self.packed, self.recent = Run(windows.sinks), Run(), Run(windows.most_recent)

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """The three runs, oldest first."""
        return self.sinks, self.packed, self.recent

    @property
    def held(self) -> int:
        """The number of held tokens."""
        return self.sinks.tokens + self.packed.tokens + self.recent.tokens

    @property
    def offset(self) -> int:
        """Tokens seen, which is the position of the next one."""
        return self.evicted + self.held

    @property
    def buffers(self) -> list[mx.array]:
        """The live buffers."""
        return [buffer for run in self.runs for buffer in run.buffers.values()]

    @property
    def nbytes(self) -> int:
        """Bytes held: sinks, codes, scales, window and growth slack.

        MLX may give a buffer a used block of memory that is up to two pages larger than it needs.
        """
        return sum(buffer.nbytes for buffer in self.buffers)

    def empty(self) -> bool:
        """Whether no token was stored."""
        return self.offset == 0

    def tensor_nbytes(self, tensor: Tensor) -> int:
        """Bytes held for the keys or for the values alone."""
        return sum(buffer.nbytes for run in self.runs for buffer in run.tensor_buffers(tensor).values())

    def take(
        self,
        arrival: Arrival,
        sinks: Codes | None = None,
        packed: Codes | None = None,
        recent: Codes | None = None,
        slid: Slid | None = None,
    ) -> None:
        """Move tokens by the counts of ``arrival``; without codes the tokens are only counted.

        ``slid`` is the window without the tokens that leave it, if it is computed already.
        """
        self.sinks.append(arrival.to_sinks, sinks)
        if arrival.gone:
            self._drop_oldest(self.packed.tokens + self.recent.tokens)
            self.evicted += arrival.gone
        self.packed.append(arrival.to_packed, packed)
        oldest = arrival.from_recent
        if slid is not None:
            self.recent.replace(self.recent.tokens - oldest, *slid.windows)
            ahead(*self.packed.buffers.values(), *slid.windows)
            oldest = 0
        if recent and arrival.to_recent == 1 and not oldest and self.recent.may_join(recent):
            self.recent.join(*(code.arrays["values"] for code in recent))
        else:
            self.recent.append(arrival.to_recent, recent, oldest)

    def encode_ahead(self, codecs: tuple[Codec, Codec] | None = None) -> None:
        """Encode the block that leaves the window next, and write its codes behind those of the packed tokens.

        So the step in which the block leaves has half the work on a GPU. The newest token is not in the block.
        """
        block, start, codes = self.windows.block, self.offset - self.recent.tokens, None
        if codecs is not None:
            oldest = [x[:, :, :block] for x in self.recent.exact.buffers]
            codes = codecs[0].encode(oldest[0], start), codecs[1].encode(oldest[1], start)
        self.packed.append(block, codes)
        self.packed.tokens, self.packed.ahead = self.packed.tokens - block, block
        ahead(*self.packed.buffers.values())

    def evict(self) -> None:
        """Drop tokens that a sliding layer no longer sees."""
        self._drop_oldest(self.windows.leaving(self.packed.tokens, self.recent.tokens))

    def drop_newest(self, count: int) -> None:
        """Drop the last ``count`` tokens."""
        for run in reversed(self.runs):
            newest = min(count, run.tokens)
            run.drop(newest=newest)
            count -= newest

    def _drop_oldest(self, count: int) -> None:
        self.evicted += count
        of_packed = min(count, self.packed.tokens)
        self.packed.drop(oldest=of_packed)
        self.recent.drop(oldest=count - of_packed)


def compressed_room(windows: Windows, tokens: int, decoded: int = 0, chunk: int = CHUNK) -> Room:
    """Room of a `CompressedKVCache` with ``chunk="exact"`` after the `calls` of a text, on this device."""
    return _room(windows, tokens, decoded, chunk, window_step())


@lru_cache(maxsize=4096)
def _room(windows: Windows, tokens: int, decoded: int, chunk: int, step: int) -> Room:
    runs, counts = Runs(windows), [*calls(tokens, decoded, chunk)]
    if windows.reach is None and chunk > 2 * BLOCK:  # the first of many chunks does not change the room
        before = counts[: -3 - decoded]
        counts = [*([sum(before)] if before else []), *counts[len(before) :]]
    for count in counts:
        all_seen = count > windows.window
        if (
            step == BLOCK
            and count == 1
            and windows.reach is None
            and runs.packed.tokens
            and runs.recent.tokens + 1 == windows.early
        ):
            runs.encode_ahead()  # as a GPU does
        runs.take(windows.arrival(count, runs.offset, runs.recent.tokens, all_seen=all_seen))
        runs.evict()
    return Room(*(run.room for run in runs.runs))
