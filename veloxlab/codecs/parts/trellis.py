"""Bitshift trellises: the level of a unit coordinate depends on the last bits of a vector's bit string.

Each coordinate adds its own number of bits to the string. The *state* is the last 8 (or 10) bits of the string, with
zeros before its start, and the level is ``table[width][state]``. Neighbouring coordinates share bits, so there are far
more levels than the new bits alone can index. The trellis is QTIP's (A. Tseng et al., 2024, arXiv 2406.11235), with
trained levels in place of computed ones. Encoding is a Viterbi search over all states.

The tables for 1 to 5 bits are trained on Gaussians by ``python -m tests.train_trellis`` and are in ``data``. Wider
codes, and all codes of the scalar form, have the Lloyd–Max levels of a Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.parts import Floats, constant, in_turn
from veloxlab.codecs.parts.codebooks import gaussian_codebook
from veloxlab.codecs.parts.packing import WIDEST, Places
from veloxlab.codecs.parts.water_filling import LEAST_WORDS
from veloxlab.kernels.encode import trellis_kernel
from veloxlab.kernels.readers import TrellisReader
from veloxlab.kernels.vectors import VectorKernel, words_per_row
from veloxlab.texts import shipped_folder

CodeName = Literal["trellis", "scalar"]
Widths = tuple[tuple[int, ...], ...]  # bits of each coordinate of each KV head

FILE = "trellis.npz"
TRAINED = 5  # bits up to which a table is trained
SCALE_BITS, STEPS = 4, 4  # of a vector's scale: its bits, and steps in an octave
_HEADROOM, _FALLS = 3.2, 0.75  # of a scale over the root-mean-square, in steps, and how it falls with each bit
_LEAST_SQUARE = 1e-9  # of a vector, so that its logarithm is finite
_ROWS = 2048  # vectors in one search
_SHARES = 8  # parts of a vector, one for each thread of a kernel
_MOST = 3, 5, WIDEST  # limits of the bits a coordinate in the densest part: a kernel is built for each


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels ``table`` ``[9, states]`` by width and state, and the distortion of a unit Gaussian by width ``[9]``.

    A state is the last ``reach`` bits, the newest highest; ``reach`` is 0 if a level depends only on its own bits.
    """

    reach: int
    table: NDArray[np.float32]
    distortion: Floats

    @property
    def states(self) -> int:
        """Number of states."""
        return int(self.table.shape[1])

    @cached_property
    def numbers(self) -> mx.array:
        """The table in a kernel's form ``[9 · states]``: one array, which keys and values share."""
        return constant(self.table.ravel())


@lru_cache
def levels_of(code: CodeName, entries: int = 256) -> Levels:
    """The levels of the scalar form, or of a trellis with tables of 256 or 1,024 ``entries``."""
    books = [gaussian_codebook(width) for width in range(1, WIDEST + 1)]
    distortion = np.array([1.0, *(book.distortion for book in books)])
    if code == "scalar":
        table = np.zeros((WIDEST + 1, 1 << WIDEST), np.float32)
        for width, book in enumerate(books, 1):
            table[width, : 1 << width] = book.levels
        return Levels(0, table, distortion)
    trained: Any = np.load(shipped_folder("data") / FILE)
    reach, table = entries.bit_length() - 1, np.zeros((WIDEST + 1, entries), np.float32)
    table[1 : TRAINED + 1] = trained[f"levels_{entries}"]
    distortion[1 : TRAINED + 1] = trained[f"distortion_{entries}"]
    backwards = reversed_bits(reach)
    for width in range(TRAINED + 1, WIDEST + 1):
        table[width, backwards] = books[width - 1].levels[np.arange(entries) & ((1 << width) - 1)]
    return Levels(reach, table, distortion)


@lru_cache
def reversed_bits(count: int) -> NDArray[np.int64]:
    """All numbers of ``count`` bits, each with its bits in reverse order."""
    numbers = np.arange(1 << count)
    return sum(((numbers >> i & 1) << (count - 1 - i) for i in range(count)), np.zeros_like(numbers))


class TrellisRows:
    """Codes the unit coordinates of a token's KV heads as one row of bits ``[B, 1, S, words]``, uint32.

    First come the scales of all heads, 4 bits each: a head's coordinates are divided by 2^(code / 4), at least 1, which
    is near their root-mean-square plus a headroom that falls with the head's bits. Then each head's bit string follows,
    without gaps, LSB first. It begins with the last coordinate, which has the largest range. In the other order squared
    errors are 2 to 5 % smaller on Gaussians, but SmolLM2's KL at 2.25 bits was .080, against .070.
    ``windows`` ``[H, D, 4]`` has for each coordinate: the first bit of its state in the row, the mask of its existing
    bits, their shift if older bits are before the start of the string, and the index of its width's levels in
    ``table``. ``weights`` ``[H, D]`` are the costs of squared errors of unit coordinates in the search. Unless
    ``scaled``, all scales are 1.
    """

    def __init__(self, widths: Widths, levels: Levels, weights: Floats | None = None, scaled: bool = True) -> None:
        bits = np.array(widths, np.int64)
        self.widths, self.levels, self.steps = bits, levels, STEPS if scaled else 0
        room = np.maximum(_HEADROOM - _FALLS * bits.mean(axis=1), 0.0) if scaled else np.zeros(len(bits))
        self.headroom = room.astype(np.float32)
        own = np.ones(bits.shape) if weights is None else weights
        self.weights = (own / own.max(axis=1, keepdims=True)).astype(np.float32)
        self.heads, self.dim = bits.shape
        head_bits = bits.sum(axis=1)
        begins = SCALE_BITS * self.heads + np.cumsum(head_bits) - head_bits
        ends = begins[:, None] + _turned(np.cumsum(_turned(bits), axis=1))
        self.words = max(LEAST_WORDS, words_per_row(int(SCALE_BITS * self.heads + head_bits.sum()), 1))
        seen = np.minimum(levels.reach, ends - begins[:, None]) if levels.reach else bits
        seen = np.where(bits > 0, seen, 0)
        lift = np.where(bits > 0, levels.reach - seen, 0) if levels.reach else np.zeros_like(bits)
        windows = np.stack([ends - seen, (1 << seen) - 1, lift, bits * levels.states], axis=-1)
        self.windows, self.table = constant(windows, mx.uint32), levels.numbers
        shares = np.add.reduceat(bits, np.arange(0, self.dim, max(1, self.dim // _SHARES)), axis=1)
        densest = int(shares.max()) / max(1, self.dim // _SHARES)
        self.most = next(most for most in _MOST if most >= min(densest, WIDEST))
        self._sizes = constant(2.0 ** (np.arange(1 << SCALE_BITS) / STEPS))
        self._states = Places((ends - seen).ravel(), seen.ravel(), self.words)
        self._codes = Places(
            *_in_order(np.concatenate([np.full(self.heads, SCALE_BITS), _turned(bits).ravel()])), self.words
        )
        self._scales = Places(*_in_order(np.full(self.heads, SCALE_BITS)), self.words)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, without those that only encoding needs."""
        return self.windows.nbytes + self.table.nbytes

    def expand(self, rows: mx.array) -> mx.array:
        """Rows to scaled levels ``[B, H, S, D]``, float32."""
        batch, _, tokens, _ = rows.shape
        shape = batch, tokens, self.heads, self.dim
        windows = self.windows.reshape(-1, 4)
        levels = mx.take(self.table, (self._states.read(rows) << windows[:, 2]) + windows[:, 3])
        return levels.reshape(shape).swapaxes(1, 2) * self.scales(rows)

    def reader(self, dim: int, rows: mx.array, shifts: mx.array | None, angles: mx.array | None) -> TrellisReader:
        """The reader of rows for kernels; see `TrellisReader`."""
        widest = int(self.widths.max(initial=0))
        tables = self.windows, self.table, shifts, angles
        return TrellisReader(dim, rows, None, None, *tables, self.levels.reach, self.most, widest)

    def scales(self, rows: mx.array) -> mx.array:
        """Scales of the vectors ``[B, H, S, 1]``."""
        return mx.take(self._sizes, self._scales.read(rows)[:, 0].swapaxes(1, 2)[..., None])

    def encode(self, tokens: mx.array) -> dict[str, mx.array]:
        """``codes`` of the unit coordinates of all heads of each token ``[B, 1, S, H·D]``, float32."""
        if not tokens.size:
            return {"codes": mx.zeros((*tokens.shape[:-1], self.words), mx.uint32)}
        y = mx.unflatten(tokens, -1, (self.heads, self.dim))
        coded = constant(self.widths > 0)
        ratio = (mx.square(y) * coded).sum(axis=-1) / mx.maximum(coded.sum(axis=-1), 1)
        steps = self.steps / 2 * mx.log2(mx.maximum(ratio, _LEAST_SQUARE)) + constant(self.headroom)
        scales = mx.clip(mx.round(steps), 0, self._sizes.size - 1).astype(mx.uint32)
        y = y / mx.take(self._sizes, scales)[..., None]
        parts = [scales]
        for head in range(self.heads):
            own = y[..., head, ::-1].reshape(-1, self.dim)
            found = in_turn(partial(self._search, head=head), own, _ROWS)
            parts.append(found.reshape(*tokens.shape[:-1], self.dim))
        return {"codes": self._codes.write(mx.concatenate(parts, axis=-1))}

    def _search(self, y: mx.array, head: int) -> mx.array:
        """Codes ``[N, D]`` of the best string for a head's unit coordinates ``[N, D]``, both in the string's order."""
        widths, weights = _turned(self.widths)[head].tolist(), _turned(self.weights)[head].tolist()
        table, states, reach = self.table.reshape(WIDEST + 1, -1), self.levels.states, self.levels.reach
        if not reach:
            edges = [(row[1:] + row[:-1]) / 2 for row in (table[w, : 1 << w] for w in range(WIDEST + 1))]
            nearest = [mx.searchsorted(edges[w], y[:, i]) if w else mx.zeros(len(y)) for i, w in enumerate(widths)]
            return mx.stack(nearest, axis=-1).astype(mx.uint32)
        costs, back = mx.where(mx.arange(states) == 0, 0.0, mx.inf), {}
        costs = mx.broadcast_to(costs, (len(y), states))
        for i, width in enumerate(widths):
            if width:
                before = mx.unflatten(costs, -1, (-1, 1 << width))  # states that differ in dropped bits
                back[i] = before.argmin(axis=-1)
                distances = (weights[i] * mx.square(y[:, i, None] - table[width])).reshape(len(y), 1 << width, -1)
                least = before.min(axis=-1)
                least = least - least.min(axis=-1, keepdims=True)  # or rounding would lose later costs
                costs = mx.flatten(least[:, None] + distances, 1)
        state, codes = costs.argmin(axis=-1), [mx.zeros(len(y), mx.uint32)] * len(widths)
        for i in reversed(back):
            rest = states >> widths[i]
            codes[i], newer = state // rest, state % rest
            oldest = mx.take_along_axis(back[i], newer[:, None], axis=-1)[:, 0]
            state = newer << widths[i] | oldest
        return mx.stack(codes, axis=-1)

    @cached_property
    def encoder(self) -> VectorKernel:
        """The kernel of `encode`."""
        reach = self.levels.reach
        table = self.levels.table[:, reversed_bits(reach)] if reach else self.levels.table
        return trellis_kernel(
            _turned(self.widths),
            _turned(self.weights),
            self.headroom,
            table,
            reversed_bits(WIDEST if reach else 0),
            self.words,
            self.steps,
        )


def _turned(numbers: NDArray[Any]) -> NDArray[Any]:
    """Numbers of each head's coordinates ``[H, D]`` in the order of its string, or back."""
    return numbers[:, ::-1]


def _in_order(widths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.cumsum(widths) - widths, widths
