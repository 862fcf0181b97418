"""The tokens of one layer in buffers that grow and shrink with them; without arrays the same code predicts room."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from veloxlab.cache.counts import BLOCK, CHUNK, SLACK_SHARE, STEP, Arrival, Room, Windows, calls
from veloxlab.codecs import TENSORS, Code, Tensor
from veloxlab.errors import InputError
from veloxlab.kernels.call import Exact
from veloxlab.kernels.devices import device_backend

# The largest magnitude that is stored. An unbiased scale is at most 4 times that, and is kept as the float16 of its
# root (`store_scale`): 4·1e9 < 65504².
LARGEST = 1e9
Arrays = dict[str, mx.array]
Codes = tuple[Code, Code]  # of keys and of values


class Run:
    """Consecutive tokens in growable buffers: named arrays ``[B, H, S, ...]``, such as ``"keys/codes"``."""

    def __init__(self, most: int | None = None, tokens: int = 0, buffers: Arrays | None = None) -> None:
        self.most, self.tokens, self.buffers = most, tokens, buffers or {}  # it will never hold more than `most`
        self.room = next((buffer.shape[2] for buffer in self.buffers.values()), 0)  # tokens that buffers can hold
        self._codes: dict[tuple[int, int], Codes] = {}  # views of the buffers as they are, by what was asked for

    def __deepcopy__(self, memo: object) -> Run:
        """A run of its own: buffers are shared until one of the two changes them."""
        return Run(self.most, self.tokens, {name: mx.array(buffer) for name, buffer in self.buffers.items()})

    def tensor_buffers(self, tensor: Tensor) -> Arrays:
        """The buffers of the ``"keys"`` or of the ``"values"``, by their names in a code."""
        start = f"{tensor}/"
        return {name.removeprefix(start): buffer for name, buffer in self.buffers.items() if name.startswith(start)}

    def codes(self, start: int = 0, skip: int = 0) -> Codes:
        """Codes but the ``skip`` oldest, as views that are kept; ``start`` is where the oldest held is in the text."""
        known = self._codes.get((start, skip))
        if known is None:
            span = slice(skip, self.tokens)
            keys, values = [Code(self.tensor_buffers(tensor), start)[span] for tensor in TENSORS]
            known = self._codes[start, skip] = keys, values
        return known

    def append(self, count: int, codes: Codes | None = None) -> None:
        """Add ``count`` tokens at the end."""
        if not count:
            return
        self._codes.clear()
        held, total = self.room, self.tokens + count
        self.room = self._room_for(count)
        for name, new in named(codes or ()).items():
            if self.room == held:
                self.buffers[name][:, :, self.tokens : total] = new
                continue
            parts = [self.buffers[name][:, :, : self.tokens]] if name in self.buffers else []
            slack = mx.zeros((*new.shape[:2], self.room - total, *new.shape[3:]), new.dtype)
            self.buffers[name] = mx.concatenate([*parts, new, slack], axis=2)
        self.tokens = total

    def join(self, keys: mx.array, values: mx.array) -> None:
        """Add an exact token to others: the short way of `append`."""
        if self.tokens == self.room:
            self.append(1, (Code({"values": keys}), Code({"values": values})))
            return
        self._codes.clear()
        at = self.tokens
        self.tokens = total = at + 1
        self.buffers["keys/values"][:, :, at:total] = keys
        self.buffers["values/values"][:, :, at:total] = values

    @property
    def exact(self) -> Exact:
        """Tokens that are exact, for a kernel: no views of the buffers."""
        return Exact(self.buffers["keys/values"], self.buffers["values/values"], self.tokens)

    def _room_for(self, new: int) -> int:
        """Room once ``new`` tokens have joined: growth by decoding takes slack, a long append is sized as it is."""
        tokens = self.tokens + new
        if tokens <= self.room and (new == 1 or self.most is None):
            return self.room
        if self.most is not None:
            return tokens + (min(STEP, self.most - tokens) if new == 1 else 0)
        return tokens + (max(STEP * (new == 1), tokens // SLACK_SHARE) if new <= BLOCK else 0)

    def drop(self, *, oldest: int = 0, newest: int = 0) -> None:
        """Forget tokens and release their memory."""
        if not oldest and not newest:
            return
        kept = slice(oldest, self.tokens - newest)
        self._codes.clear()
        self.tokens = self.room = kept.stop - kept.start
        # a view would keep the whole buffer alive
        self.buffers = {n: mx.contiguous(b[:, :, kept]) for n, b in self.buffers.items()} if self.tokens else {}


def named(codes: Sequence[Code]) -> Arrays:
    """Arrays of keys' and values' codes by their names in a run; nothing of none."""
    both = zip(TENSORS, codes, strict=False)
    return {f"{tensor}/{name}": array for tensor, code in both for name, array in code.arrays.items()}


class Runs:
    """Three runs of tokens in order: ``sinks``, ``packed`` and ``recent``."""

    def __init__(self, windows: Windows) -> None:
        self.windows, self.evicted = windows, 0  # tokens behind the sinks that were forgotten
        self.sinks, self.packed, self.recent = Run(windows.sinks), Run(), Run(windows.most_recent)

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """Oldest first."""
        return self.sinks, self.packed, self.recent

    @property
    def held(self) -> int:
        """Tokens held."""
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
        """Bytes held: sinks, codes, scales, window and growth slack."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def empty(self) -> bool:
        """Whether no token has come."""
        return self.offset == 0

    def tensor_nbytes(self, tensor: Tensor) -> int:
        """Bytes held for the keys or for the values alone."""
        return sum(buffer.nbytes for run in self.runs for buffer in run.tensor_buffers(tensor).values())

    def take(
        self, arrival: Arrival, sinks: Codes | None = None, packed: Codes | None = None, recent: Codes | None = None
    ) -> None:
        """Move tokens as ``arrival`` says; without the codes that join each run they are counted alone."""
        self.sinks.append(arrival.to_sinks, sinks)
        if arrival.gone:
            self._drop_oldest(self.packed.tokens + self.recent.tokens)
            self.evicted += arrival.gone
        self.recent.drop(oldest=arrival.from_recent)
        self.packed.append(arrival.to_packed, packed)
        self.recent.append(arrival.to_recent, recent)

    def evict(self) -> None:
        """Forget what a sliding layer sees no more."""
        self._drop_oldest(self.windows.leaving(self.packed.tokens, self.recent.tokens))

    def drop_newest(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        for run in reversed(self.runs):
            newest = min(count, run.tokens)
            run.drop(newest=newest)
            count -= newest

    def _drop_oldest(self, count: int) -> None:
        self.evicted += count
        of_packed = min(count, self.packed.tokens)
        self.packed.drop(oldest=of_packed)
        self.recent.drop(oldest=count - of_packed)


class Checks:
    """Whether keys and values that were stored are numbers that a codec can store; a GPU is not waited for to know."""

    def __init__(self) -> None:
        self._of_last: mx.array | None = None  # call
        self._before: mx.array | None = None

    def of(self, layer: int, arrays: Sequence[mx.array]) -> tuple[list[mx.array], mx.array | None]:
        """Keys and values, which alternate, and what is to be `kept` of them; raises `InputError` where that is known.

        They are computed after their check.
        """
        # in a smaller type the limit itself would be infinite; the comparison is false for NaN too
        good = mx.stack([(mx.abs(x) <= min(LARGEST, mx.finfo(x.dtype).max)).all() for x in arrays])
        if not device_backend().lazy:
            _check(layer, good)
            return list(arrays), None
        return list(mx.depends(list(arrays), [good])), good

    def kept(self, good: mx.array | None) -> None:
        """The check of what a call has stored."""
        self._before, self._of_last = self._of_last, good

    def look(self, layer: int) -> None:
        """Raise `InputError` for what the call before the last stored, which has been computed by now."""
        if self._before is not None:
            _check(layer, self._before)

    def settle(self, layer: int) -> None:
        """Wait for all of it, and raise `InputError` as `look` does."""
        self.look(layer)
        if self._of_last is not None:
            _check(layer, self._of_last)


def _check(layer: int, good: mx.array) -> None:
    found = np.asarray(good)
    if not found.all():
        raise InputError(
            f"Layer {layer}: the {TENSORS[int(found.argmin()) % 2]} of a token are NaN, infinite or beyond "
            f"±{LARGEST:.0e} and cannot be stored. The model overflowed, most likely in float16: load it in bfloat16 "
            "or float32 and start with a new cache."
        )


@lru_cache(maxsize=4096)
def compressed_room(windows: Windows, tokens: int, decoded: int = 0, chunk: int = CHUNK) -> Room:
    """Room of a `CompressedKVCache` after the `calls` of a text, its ``chunk`` being ``"exact"``."""
    runs = Runs(windows)
    for count in calls(tokens, decoded, chunk):
        all_seen = count > windows.window
        runs.take(windows.arrival(count, runs.offset, runs.recent.tokens, all_seen=all_seen))
        runs.evict()
    return Room(*(run.room for run in runs.runs))
