"""Consecutive tokens of a cache, in buffers that grow with them and shrink when they go."""

from __future__ import annotations

import mlx.core as mx

from veloxlab.cache.counts import BLOCK
from veloxlab.codecs import Code

Arrays = dict[str, mx.array]

_SLACK_SHARE = 64  # a buffer that has to grow takes 1/64 more than it needs, so that growth costs O(1) a token
_TOKENS = 2


def room(held: int, tokens: int, new: int, most: int | None) -> int:
    """Tokens that a run's buffers have room for once ``new`` ones have joined, ``tokens`` in all.

    ``held`` is what they had room for before, 0 if there were none, and ``most`` as for `Run`. At most a block of
    tokens at a time is growth by decoding, and many will come; a longer append is sized as it is, and so is any but of
    one token to a run that stays small.
    """
    if tokens <= held and (new == 1 or most is None):
        return held
    if most is not None:
        return tokens + (min(8, most - tokens) if new == 1 else 0)
    return tokens + (max(8 * (new == 1), tokens // _SLACK_SHARE) if new <= BLOCK else 0)


class Run:
    """Consecutive tokens in growable buffers: named arrays ``[B, H, S, ...]``, all with the same tokens.

    ``most`` is the largest number of tokens it will ever hold, where that is known.
    """

    def __init__(self, most: int | None = None, buffers: Arrays | None = None, tokens: int = 0) -> None:
        self._buffers: Arrays = buffers or {}
        self.tokens = tokens
        self.most = most
        self._codes: dict[tuple[str, int, int], Code] = {}  # views of the buffers as they are, by what was asked for

    def __deepcopy__(self, memo: object) -> Run:
        """A run of its own: buffers are shared until one of the two changes them."""
        return Run(self.most, {name: mx.array(buffer) for name, buffer in self._buffers.items()}, self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, slack included."""
        return sum(b.nbytes for b in self._buffers.values())

    def side_nbytes(self, side: str) -> int:
        """Bytes of the buffers whose name starts with ``side/``."""
        return sum(b.nbytes for name, b in self._buffers.items() if name.startswith(f"{side}/"))

    @property
    def buffers(self) -> Arrays:
        """The live buffers, by side and name: ``"keys/codes"``."""
        return self._buffers

    def code(self, side: str, start: int = 0, skip: int = 0) -> Code:
        """The arrays whose name starts with ``side/``, as the code of the tokens held but for the ``skip`` oldest.

        ``start`` is the position in the text of the oldest token held. Most runs are as they were at the token before:
        they are asked for in every layer at every token, and cut again only once they have changed.
        """
        known = self._codes.get((side, start, skip))
        if known is None:
            views = {
                name.removeprefix(f"{side}/"): buffer[:, :, skip : self.tokens]
                for name, buffer in self._buffers.items()
                if name.startswith(f"{side}/")
            }
            known = self._codes[side, start, skip] = Code(views, start + skip)
        return known

    def fill(self, buffers: Arrays, tokens: int) -> None:
        """Hold ``tokens`` tokens in ``buffers``, as they were held before."""
        self._codes.clear()
        self._buffers, self.tokens = buffers, tokens

    def append(self, keys: Code, values: Code) -> None:
        """Add tokens at the end."""
        arrays = {f"keys/{n}": a for n, a in keys.arrays.items()} | {f"values/{n}": a for n, a in values.arrays.items()}
        total = self.tokens + keys.tokens
        self._codes.clear()
        for name, new in arrays.items():
            buffer = self._buffers.get(name)
            held = 0 if buffer is None else buffer.shape[_TOKENS]
            wanted = room(held, total, keys.tokens, self.most)
            if buffer is not None and wanted == held:
                buffer[:, :, self.tokens : total] = new
                continue
            parts = [] if buffer is None else [buffer[:, :, : self.tokens]]
            shape = (*new.shape[:_TOKENS], wanted - total, *new.shape[_TOKENS + 1 :])
            self._buffers[name] = mx.concatenate([*parts, new, mx.zeros(shape, new.dtype)], axis=_TOKENS)
        self.tokens = total

    def drop_oldest(self, count: int) -> None:
        """Forget the first ``count`` tokens and release their memory."""
        self._keep(slice(count, self.tokens))

    def drop_newest(self, count: int) -> None:
        """Forget the last ``count`` tokens and release their memory."""
        self._keep(slice(0, self.tokens - count))

    def _keep(self, span: slice) -> None:
        self._codes.clear()
        if span.start == span.stop:
            self._buffers = {}
        else:  # a view would keep the whole buffer alive
            self._buffers = {n: mx.contiguous(b[:, :, span]) for n, b in self._buffers.items()}
        self.tokens = span.stop - span.start
