"""The interface between codes and kernels: a codec provides arrays and tables, so no kernel depends on an algorithm.

A reader has the keys or values of a layer's packed tokens, vectors ``[B, H, S, dim]`` in the space of the codes. The
codec's `expand` of the same arrays defines them; ``source/read_*.h`` read them on a GPU, ``cpu/readers.py`` on a CPU.
On Metal a kernel takes 31 arrays, and the strides of an array count as another: a reader can have 7.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

_BANKS = 32  # of threadgroup memory, 4 bytes wide


class Room(NamedTuple):
    """Threadgroup memory for a reader's tables: words of 4 bytes, and the words of a pair of levels.

    A threadgroup alone on a processor has ``large_words`` more; ``large`` declares an array there.
    """

    words: int
    pair_words: int
    large_words: int = 0
    large: str = "threadgroup {kind} {name}[{count}];"

    def copies(self, entries: int, pairs: int) -> int:
        """The number of copies of ``entries`` of ``pairs`` each (0: one number) that fit, a power of two, 1 or more.

        With as many copies as banks every lane has its own.
        """
        copies, words = 1, pairs * self.pair_words or 1
        while 2 * copies * max(pairs, 1) <= _BANKS and 2 * copies * words * entries <= self.words:
            copies *= 2
        return copies


class Fragment(NamedTuple):
    """Text of a reader in a kernel: threadgroup variables, and statements that make the reader.

    ``queries`` are statements for row ``r`` of the queries ``q_coded[at]``, which is ``real``. ``kept`` is whether
    coordinate ``i`` of codes counts, and ``place`` its index. ``added`` makes the part of scores that is not from
    codes, ``summed`` transforms sums of values; see ``source/attend.h``. ``number`` is coordinate ``i`` of a vector in
    the space of the codes, from its scaled level ``x``, and ``rest`` writes the part for its position to ``row``.
    """

    declarations: str
    setup: str
    queries: str = ""
    kept: str = "true"
    place: str = "(i)"
    added: str = "const NothingAdded added = {};"
    summed: str = "const AsSummed summed = {};"
    number: str = "(x)"
    rest: str = ""


@dataclass(frozen=True, eq=False)
class Reader(ABC):
    """Packed vectors ``[B, H, S, dim]``; see `veloxlab.kernels.readers.reader`."""

    name: ClassVar[str]  # of the layout
    stored: ClassVar[tuple[str, ...]] = ("rows",)  # fields with a row for every token, in the kernel's order
    tables: ClassVar[tuple[str, ...]] = ()  # fields without a token axis,
    joined_tables: ClassVar[tuple[str, ...]] = ()  # those of float32 whose sizes follow from `key`
    sum_headers: ClassVar[tuple[str, ...]] = ()  # files of ``source/`` for the parts of attention besides levels
    levels_alone: ClassVar[bool] = False  # whether a kernel decodes to levels, and the codec transforms these
    one_copy: ClassVar[bool] = False  # whether keys and values with the same ``table`` share its copy

    dim: int  # coordinates of a vector in the space of the codes
    rows: mx.array  # packed codes [B, H, S, words], uint32, or bytes
    scales: mx.array | None  # square root of each vector's scale [B, H, S, 1], float16, or None for 1
    signs: mx.array | None  # of the Hadamard rotation to that space [dim], float32; None for other transforms

    @property
    @abstractmethod
    def headers(self) -> tuple[str, ...]:
        """Files of ``source/`` that have the reader."""

    @property
    @abstractmethod
    def constants(self) -> tuple[int, ...]:
        """Constants in the text, besides those of `key`."""

    @abstractmethod
    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """Text that makes ``{prefix}_reader``, with tables in threadgroup memory within ``room``.

        ``home`` is the prefix of the reader that fills the table: the other one's, if both share a table.
        """

    @property
    def tokens(self) -> int:
        """S, the number of tokens."""
        return self.rows.shape[2]

    @property
    def kv_heads(self) -> int:
        """H, the number of KV heads."""
        return self.rows.shape[1]

    @property
    def lookup(self) -> mx.array | None:
        """The table, of which keys and values with the same one can share a copy; None without one."""
        return getattr(self, "table", None) if self.one_copy else None

    @property
    def key(self) -> tuple[object, ...]:
        """The key of the kernel for this reader."""
        return self.name, self.dim, self.kv_heads, self.signs is None, self.scales is None, *self.constants

    @property
    def coordinates(self) -> int:
        """How many of `dim` coordinates are from codes; the others are from the position."""
        return self.dim

    @property
    def large_words(self) -> int:
        """Words of one copy of a table that every lane should have; 0 without one."""
        return 0

    @property
    def tile_words(self) -> int:
        """Words of threadgroup memory that a simdgroup needs for its tile of tokens, if these are keys."""
        return 0

    def own_words(self, product_tokens: int) -> int:
        """Words of threadgroup memory besides these and tables; a product of the matrix unit has so many tokens."""
        return 0

    def shares(self, count: int) -> bool:
        """Whether ``count`` threads can read a vector in equal shares of whole pairs."""
        return self.coordinates % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """Inputs of the kernel, by name."""
        fields = (*self.stored, "scales", *self.tables)
        return {f"{prefix}_{name}": array for name in fields if (array := getattr(self, name)) is not None}

    @property
    def stored_arrays(self) -> list[mx.array]:
        """The inputs with a row for every token."""
        fields = (*self.stored, "scales")
        return [array for name in fields if (array := getattr(self, name)) is not None]

    def begins(self, prefix: str) -> list[str]:
        """Members of the kernel's reader: the start of the head's part of each stored array, and a token's stride."""
        return [with_stride(f"{prefix}_{name}") for name in self.stored if getattr(self, name) is not None]

    def scaled(self, prefix: str, head: str = "head") -> tuple[str, str]:
        """Type and value of the member that has the scales."""
        if self.scales is None:
            return "NoScales", "{}"
        return "StoredScales", f"{{{with_stride(f'{prefix}_scales', head)}}}"


def with_stride(name: str, head: str = "head") -> str:
    """Two members of a reader: the start of this batch entry's and head's part of an array, and a token's stride."""
    return f"{name} + batch * {name}_strides[0] + {head} * {name}_strides[1], uint({name}_strides[2])"


def made(prefix: str, type_name: str, *members: str) -> str:
    """The statement that makes a reader of ``members``."""
    return f"const {type_name} {prefix}_reader = {{{', '.join(members)}}};"
