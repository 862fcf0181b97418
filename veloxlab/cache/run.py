"""Consecutive tokens of one layer in buffers that grow and shrink. Without arrays the same code predicts their room."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx

from veloxlab.cache.counts import SLACK_SHARE, STEP, packed_slack, window_step
from veloxlab.codecs import TENSORS, Code, Tensor
from veloxlab.codecs.base import TOKENS
from veloxlab.kernels.backend import Backend
from veloxlab.kernels.call import Exact
from veloxlab.kernels.slide import Slid, slid

_EXACT = "keys/values", "values/values"  # the buffers of exact tokens
Arrays = dict[str, mx.array]
Codes = tuple[Code, Code]  # of keys and of values


class Run:
    """Consecutive tokens in growable buffers: named arrays ``[B, H, S, ...]``, such as ``"keys/codes"``."""

    def __init__(self, most: int | None = None, tokens: int = 0, buffers: Arrays | None = None) -> None:
        self.most, self.tokens, self.buffers = most, tokens, buffers or {}  # `most`: the limit of tokens
        self.room = next((buffer.shape[2] for buffer in self.buffers.values()), 0)  # tokens that buffers can hold
        self._codes: dict[tuple[int, int], Codes] = {}  # views of the current buffers, by (start, skip)
        self.ahead = 0  # tokens behind these whose codes are in the buffers already

    @property
    def buffers(self) -> Arrays:
        """The live buffers, with all tokens."""
        if self._exact is not None:
            self.buffers = dict(zip(_EXACT, self._exact.complete(), strict=True))
        return self._buffers

    @buffers.setter
    def buffers(self, buffers: Arrays) -> None:
        self._buffers = buffers
        self._exact: Exact | None = None  # the same buffers after `exact`, where a kernel of attention replaces them

    def __deepcopy__(self, memo: object) -> Run:
        """A copy, which shares the buffers until one of the two changes them."""
        return Run(self.most, self.tokens, {name: mx.array(buffer) for name, buffer in self.buffers.items()})

    def tensor_buffers(self, tensor: Tensor) -> Arrays:
        """The buffers of the ``"keys"`` or of the ``"values"``, by their names in a code."""
        start = f"{tensor}/"
        return {name.removeprefix(start): buffer for name, buffer in self.buffers.items() if name.startswith(start)}

    def codes(self, start: int = 0, skip: int = 0) -> Codes:
        """Codes without the ``skip`` oldest, as cached views; ``start`` is the position of the oldest held token."""
        known = self._codes.get((start, skip))
        if known is None:
            arrays: tuple[Arrays, Arrays] = {}, {}
            for name, buffer in self.buffers.items():
                tensor, _, own = name.partition("/")
                arrays[TENSORS.index(tensor)][own] = buffer[:, :, skip : self.tokens]
            known = self._codes[start, skip] = Code(arrays[0], start + skip), Code(arrays[1], start + skip)
        return known

    def whole(self, start: int) -> Codes:
        """The whole buffers as codes, with the unused room."""
        return Code(self.tensor_buffers("keys"), start), Code(self.tensor_buffers("values"), start)

    def append(self, count: int, codes: Codes | None = None, oldest: int = 0) -> None:
        """Drop the ``oldest`` tokens, and add ``count`` at the end."""
        if not count:
            self.drop(oldest=oldest)
            return
        self._codes.clear()
        self.ahead = 0
        held, kept = self.room, slice(oldest, self.tokens)
        self.tokens -= oldest
        if oldest:
            self.room = self.tokens
        total, self.room = self.tokens + count, self._room_for(count)
        for name, new in named(codes or ()).items():
            if self.room == held and not oldest:
                self.buffers[name][:, :, kept.stop : total] = new
                continue
            parts = [self.buffers[name][:, :, kept], new] if self.tokens else [new]
            if self.room > total:
                parts.append(_slack((*new.shape[:2], self.room - total, *new.shape[3:]), new.dtype))
            # one part is usually a view, which would keep the keys or values of a whole prompt alive
            self.buffers[name] = mx.concatenate(parts, axis=2) if len(parts) > 1 else mx.contiguous(new)
        self.tokens = total

    def join(self, keys: mx.array, values: mx.array) -> Exact:
        """Add one exact token, which goes into the buffers when somebody needs them: a faster `append`."""
        if self._codes:
            self._codes.clear()
        if self.tokens == self.room:
            self._grow()
        last = self.exact
        buffers = last.buffers if last.coming is None else last.complete()
        self.tokens += 1
        self._exact = Exact(buffers[0], buffers[1], self.tokens, self.room, (keys, values))
        return self._exact

    def may_join(self, codes: Codes) -> bool:
        """Whether a token of this dtype can `join`: there are others of the same."""
        return bool(self.tokens) and all(x.dtype == self.buffers[name].dtype for name, x in named(codes).items())

    def _grow(self) -> None:
        """Make room for one more token."""
        self.room = self._room_for(1)
        shapes = {name: (*x.shape[:2], self.room - self.tokens, *x.shape[3:]) for name, x in self.buffers.items()}
        self.buffers = {
            name: mx.concatenate([x[:, :, : self.tokens], _slack(shapes[name], x.dtype)], axis=2)
            for name, x in self.buffers.items()
        }

    def slid(self, oldest: int, backend: Backend) -> Slid | None:
        """The buffers without the ``oldest`` tokens and with room for one more, by a kernel."""
        windows = [self.buffers[name] for name in _EXACT]
        return slid(windows, oldest, self.tokens, self._grown(self.tokens - oldest + 1, 1), backend)

    def replace(self, tokens: int, keys: mx.array, values: mx.array) -> None:
        """Hold the first ``tokens`` of these exact ones."""
        self._codes.clear()
        self.tokens, self.room = tokens, keys.shape[2]
        self.buffers = dict(zip(_EXACT, (keys, values), strict=True))

    @property
    def exact(self) -> Exact:
        """The exact tokens in a kernel's form, with the buffers themselves."""
        if self._exact is None or (self._exact.tokens, self._exact.room) != (self.tokens, self.room):
            keys, values = (self.buffers[name] for name in _EXACT)
            self._exact = Exact(keys, values, self.tokens, self.room)
        return self._exact

    def _room_for(self, new: int) -> int:
        """Room after ``new`` tokens have joined: growth by decoding takes slack, a long append takes what it needs."""
        tokens = self.tokens + new
        if tokens <= self.room and (new == 1 or self.most is None):
            return self.room
        return self._grown(tokens, new)

    def _grown(self, tokens: int, new: int) -> int:
        if self.most is not None:
            return tokens + (min(window_step(), self.most - tokens) if new == 1 else 0)
        return tokens + packed_slack(tokens, new)

    def drop(self, *, oldest: int = 0, newest: int = 0) -> None:
        """Drop tokens and release their memory."""
        self.ahead = 0  # of a layer's newest tokens some are dropped: another block may leave next
        if not oldest and not newest:
            return
        kept = slice(oldest, self.tokens - newest)
        self._codes.clear()
        if self.most is None and not oldest and self.room - kept.stop <= kept.stop // SLACK_SHARE:
            self.tokens = kept.stop  # so few are not worth a copy of a long text
            return
        self.tokens = self.room = kept.stop - kept.start
        # a view would keep the whole buffer alive
        self.buffers = {n: mx.contiguous(b[:, :, kept]) for n, b in self.buffers.items()} if self.tokens else {}


def named(codes: Sequence[Code]) -> Arrays:
    """Arrays of the codes of keys and values by their names in a run; empty without codes."""
    both = zip(TENSORS, codes, strict=False)
    return {f"{tensor}/{name}": array for tensor, code in both for name, array in code.arrays.items()}


def _slack(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Room for later tokens; small arrays are made once."""
    return _few_zeros(shape, dtype) if shape[TOKENS] <= STEP else mx.zeros(shape, dtype)


@lru_cache
def _few_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    zeros = mx.zeros(shape, dtype)
    mx.eval(zeros)
    return zeros
