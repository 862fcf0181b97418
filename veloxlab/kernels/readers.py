"""How a kernel reads codes: layouts and tables that codecs hand over, so that no kernel knows an algorithm.

A reader is one side (keys or values) of a layer's packed tokens. It gives vectors ``[B, H, S, dim]`` in the space of
the codes. `Reader.expand` says in MLX ops what they are; ``source/readers.h`` says the same to a GPU.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx

_BANKS = 32  # of threadgroup memory, 4 bytes wide
_MOST_ENTRIES = 4096  # numbers of a table that goes to threadgroup memory


@dataclass(frozen=True, eq=False)
class Spread:
    """A space of codes that `veloxlab.codecs.transforms.SignedHadamard` leads to, which kernels know how to enter."""

    signs: mx.array  # [dim], float32

    def enter(self, x: mx.array) -> mx.array:
        """Bring vectors ``[..., dim]`` there, by MLX ops."""
        return self._transform(x * self.signs)

    def leave(self, y: mx.array) -> mx.array:
        """Undo `enter`."""
        return self._transform(y) * self.signs

    def _transform(self, x: mx.array) -> mx.array:
        dim = x.shape[-1]
        size = dim & -dim
        blocks = mx.hadamard_transform(x.reshape(*x.shape[:-1], dim // size, size))
        turn = 2 * math.pi / (dim // size) * mx.arange(dim // size)[:, None] * mx.arange(dim // size)
        hartley = (mx.cos(turn) + mx.sin(turn)) / math.sqrt(dim // size)
        return (hartley @ blocks).reshape(x.shape)


@dataclass(frozen=True)
class Fragment:
    """Text of a reader in a kernel: threadgroup variables, and statements that make the reader."""

    declarations: str
    setup: str


@dataclass(frozen=True, eq=False)
class Reader(ABC):
    """Packed vectors ``[B, H, S, dim]``.

    Attributes
    ----------
    dim : coordinates of a vector in the space of the codes.
    rows : packed codes ``[B, H, S, words]``, uint32.
    root_scale : square root of each vector's scale ``[B, H, S, 1]``, float16, or None for 1.
    space : how queries get into the space of the codes and mixes out of it, or None where a kernel cannot do it.
    """

    dim: int
    rows: mx.array
    root_scale: mx.array | None
    space: Spread | None

    @property
    def tokens(self) -> int:
        """S."""
        return self.rows.shape[2]

    @property
    def table_identity(self) -> object | None:
        """What the reader looks up in, so that keys and values with the same table keep one copy; None without one."""
        return None

    @property
    @abstractmethod
    def key(self) -> tuple[int | str, ...]:
        """What tells the kernel that reads this from other kernels."""

    @abstractmethod
    def shares(self, count: int) -> bool:
        """Whether a vector can be read in ``count`` equal shares, each by a thread of its own."""

    @abstractmethod
    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """Inputs of the kernel, by name."""

    @abstractmethod
    def fragment(self, prefix: str, home: str, budget: int) -> Fragment:
        """Text that makes ``{prefix}_reader``, with at most ``budget`` words of threadgroup memory for its tables.

        ``home`` is the prefix of the side that has the table, which may be the other one, if both have the same.
        """

    @abstractmethod
    def levels(self) -> mx.array:
        """Vectors before scaling ``[B, H, S, dim]``, float32, by MLX ops."""

    def made_up(self, tokens: int, seed: int) -> Self:
        """The same tables with random codes and scales of one batch entry's ``tokens``, to try a kernel on."""
        heads, words = self.rows.shape[1], self.rows.shape[3]
        codes, scales = mx.random.split(mx.random.key(seed))
        rows: mx.array = mx.random.randint(0, 1 << 16, (2, 1, heads, tokens, words), key=codes).astype(mx.uint32)
        rows = rows[0] << 16 | rows[1]
        root = mx.random.uniform(0.5, 1.5, (1, heads, tokens, 1), key=scales).astype(mx.float16)
        return replace(self, rows=rows, root_scale=None if self.root_scale is None else root)

    def expand(self) -> mx.array:
        """Vectors ``[B, H, S, dim]``, float32: the twin of what a kernel reads."""
        levels = self.levels()
        return levels if self.root_scale is None else levels * mx.square(self.root_scale.astype(mx.float32))


@dataclass(frozen=True, eq=False)
class TableReader(Reader):
    """Codes of ``bits`` bits, LSB first and without gaps, each of which stands for a row of ``table``.

    ``table`` is ``[2**bits, n]`` float32, with n 1 or even: the levels of n neighbouring coordinates. Narrow scalar
    codes are read two at a time; the codes of a vector quantizer are of the same kind.
    """

    bits: int
    table: mx.array

    @property
    def width(self) -> int:
        """Coordinates that a code stands for."""
        return self.table.shape[1]

    @property
    def table_identity(self) -> object | None:
        """The table itself."""
        return self.table

    @property
    def key(self) -> tuple[int | str, ...]:
        """See `Reader.key`."""
        return "table", self.bits, self.width, self.rows.shape[3]

    def shares(self, count: int) -> bool:
        """See `Reader.shares`: no code may be cut."""
        return self.dim % count == 0 and self.dim // count % max(2, self.width) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """See `Reader.arrays`."""
        return {f"{prefix}_rows": self.rows, **_scale_arrays(prefix, self), f"{prefix}_table": self.table}

    def fragment(self, prefix: str, home: str, budget: int) -> Fragment:
        """See `Reader.fragment`."""
        entries, width = self.table.shape
        scales = "NoScales" if self.root_scale is None else "StoredScales"
        reader = f"TableReader<{self.bits}, {width}, {self.rows.shape[3]}, {scales}, "
        if width > 1 and self.table.size > _MOST_ENTRIES:
            return Fragment("", _reader(prefix, f"{reader}GlobalTable<{width}>>", self, f"{{{home}_table}}"))
        words = max(1, width // 2)  # of an entry: a number, or pairs
        copies = self._copies(entries, words, budget)
        kind, element = (
            (f"SingleTable<{copies}>", "float") if width == 1 else (f"SharedTable<{width}, {copies}>", "pair_t")
        )
        made = _reader(
            prefix,
            f"{reader}{kind}>",
            self,
            f"{{place_of({home}_entries + lane % {copies} * {words}), "
            f"opaque({copies * words} * uint(sizeof({element})))}}",
        )
        if home != prefix:
            return Fragment("", made)
        entry = (
            f"{prefix}_table[e]"
            if width == 1
            else f"make_pair({prefix}_table[e * {width} + 2 * w], {prefix}_table[e * {width} + 2 * w + 1])"
        )
        # lanes write their entries' copies in an order of their own, or they would all meet in one bank
        fill = (
            f"for (uint i = thread_id; i < {entries * words}; i += THREADS) {{\n"
            f"  const uint e = i / {words}, w = i % {words};\n"
            f"  const {element} entry = {entry};\n"
            f"  for (uint c = 0; c < {copies}; c++) "
            f"{prefix}_entries[(e * {copies} + (c + e) % {copies}) * {words} + w] = entry;\n"
            "}\n"
        )
        return Fragment(f"threadgroup {element} {prefix}_entries[{entries * copies * words}];", fill + made)

    @staticmethod
    def _copies(entries: int, words: int, budget: int) -> int:
        copies = 1
        while 2 * copies * words <= _BANKS and 2 * copies * words * entries <= budget:
            copies *= 2
        return copies

    def levels(self) -> mx.array:
        """See `Reader.levels`."""
        count = self.dim // self.width
        first = mx.arange(count, dtype=mx.uint32) * self.bits
        word, shift = first // 32, (first % 32).astype(mx.uint64)
        following = mx.take(self.rows, mx.minimum(word + 1, self.rows.shape[-1] - 1), axis=-1).astype(mx.uint64) << 32
        both = mx.take(self.rows, word, axis=-1).astype(mx.uint64) | following
        codes = ((both >> shift) & ((1 << self.bits) - 1)).astype(mx.uint32)
        return mx.take(self.table, codes, axis=0).reshape(*self.rows.shape[:3], self.dim)


def _at(name: str) -> str:
    """Where the rows of this batch entry and head begin."""
    return f"{name} + batch * {name}_strides[0] + head * {name}_strides[1]"


def _scale_arrays(prefix: str, reader: Reader) -> dict[str, mx.array]:
    return {} if reader.root_scale is None else {f"{prefix}_scales": reader.root_scale}


def _reader(prefix: str, type_name: str, reader: Reader, tables: str) -> str:
    """The statement that makes a reader from rows, scales and ``tables``."""
    name = f"{prefix}_scales"
    scales = "" if reader.root_scale is None else f"{_at(name)}, uint({name}_strides[2])"
    return (
        f"const {type_name} {prefix}_reader = {{{_at(prefix + '_rows')}, uint({prefix}_rows_strides[2]), "
        f"{{{scales}}}, {tables}}};"
    )
