"""What a kernel asks of codes: arrays and tables that a codec hands over, so that no kernel knows an algorithm.

A reader is keys or values of a layer's packed tokens, vectors ``[B, H, S, dim]`` in the space of the codes. What they
are is what the codec expands the same arrays to; ``source/read_*.h`` say it to a GPU, ``cpu/readers.py`` to a CPU.
On Metal a kernel takes 31 arrays, and the strides of one count as another: a reader has room for 7.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

_BANKS = 32  # of threadgroup memory, 4 bytes wide


class Room(NamedTuple):
    """Threadgroup memory for a reader's tables: words of 4 bytes, and how many of them a pair of levels takes.

    There are ``large_words`` more where a threadgroup has a processor alone; ``large`` declares an array in them.
    """

    words: int
    pair_words: int
    large_words: int = 0
    large: str = "threadgroup {kind} {name}[{count}];"

    def copies(self, entries: int, pairs: int) -> int:
        """How often ``entries`` of so many ``pairs`` (0: one number) may stand there, a power of two; 1 at least.

        Of as many copies as there are banks every lane has its own.
        """
        copies, words = 1, pairs * self.pair_words or 1
        while 2 * copies * max(pairs, 1) <= _BANKS and 2 * copies * words * entries <= self.words:
            copies *= 2
        return copies


class Fragment(NamedTuple):
    """Text of a reader in a kernel: threadgroup variables, and statements that make the reader.

    ``queries`` are statements for row ``r`` of the queries ``q_coded[at]``, which is ``real``; ``kept`` says whether
    coordinate ``i`` of codes counts, and ``place`` as which it is read. ``added`` makes what scores have beside those
    of codes, ``summed`` what becomes of sums of values; see ``source/attend.h``. ``number`` is coordinate ``i`` of a
    vector in the space of the codes, of its scaled level ``x``, and ``rest`` writes to ``row`` what it has of its
    position.
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
    tables: ClassVar[tuple[str, ...]] = ()  # fields that are the same for all tokens
    sum_headers: ClassVar[tuple[str, ...]] = ()  # files of ``source/`` with what attention has besides its levels
    levels_alone: ClassVar[bool] = False  # whether a kernel decodes them, and their codec brings them out
    one_copy: ClassVar[bool] = False  # whether keys and values that have the same ``table`` share its copy

    dim: int  # coordinates of a vector in the space of the codes
    rows: mx.array  # packed codes [B, H, S, words], uint32, or bytes
    scales: mx.array | None  # square root of each vector's scale [B, H, S, 1], float16, or None for 1
    signs: mx.array | None  # of the Hadamard rotation to that space [dim], float32; None for a transform unknown here

    @property
    @abstractmethod
    def headers(self) -> tuple[str, ...]:
        """Files of ``source/`` that have the reader."""

    @property
    @abstractmethod
    def constants(self) -> tuple[int, ...]:
        """Numbers that the text is made for, beside those of `key`."""

    @abstractmethod
    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """Text that makes ``{prefix}_reader``, with its tables in at most as much threadgroup memory as there is room.

        ``home`` is the prefix of the reader that fills the table: the other one's, if both look up in the same.
        """

    @property
    def tokens(self) -> int:
        """S."""
        return self.rows.shape[2]

    @property
    def kv_heads(self) -> int:
        """H."""
        return self.rows.shape[1]

    @property
    def lookup(self) -> mx.array | None:
        """The table, of which one copy is enough for keys and values that have the same; None without one."""
        return getattr(self, "table", None) if self.one_copy else None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells the kernel that reads this from other kernels."""
        return self.name, self.dim, self.kv_heads, self.signs is None, self.scales is None, *self.constants

    @property
    def coordinates(self) -> int:
        """Those that codes of a token say, of `dim`; the others say where it is."""
        return self.dim

    @property
    def large_words(self) -> int:
        """Words of a table of which every lane should have a copy, once; 0 without one."""
        return 0

    @property
    def own_words(self) -> int:
        """Words of threadgroup memory that are taken beside tables."""
        return 0

    def shares(self, count: int) -> bool:
        """Whether a vector can be read in ``count`` equal shares, each by a thread of its own, in whole pairs."""
        return self.coordinates % (2 * count) == 0

    def arrays(self, prefix: str) -> dict[str, mx.array]:
        """Inputs of the kernel, by name."""
        fields = (*self.stored, "scales", *self.tables)
        return {f"{prefix}_{name}": array for name in fields if (array := getattr(self, name)) is not None}

    @property
    def stored_arrays(self) -> list[mx.array]:
        """Those that have something of every token."""
        fields = (*self.stored, "scales")
        return [array for name in fields if (array := getattr(self, name)) is not None]

    def begins(self, prefix: str) -> list[str]:
        """Members of the kernel's reader: where the head's part of each stored array begins, and a token's step."""
        return [with_stride(f"{prefix}_{name}") for name in self.stored if getattr(self, name) is not None]

    def scaled(self, prefix: str, head: str = "head") -> tuple[str, str]:
        """Type and value of the member that has the scales."""
        if self.scales is None:
            return "NoScales", "{}"
        return "StoredScales", f"{{{with_stride(f'{prefix}_scales', head)}}}"


def with_stride(name: str, head: str = "head") -> str:
    """Two members of a reader: where this batch entry's and head's part of an array begins, and a token's step."""
    return f"{name} + batch * {name}_strides[0] + {head} * {name}_strides[1], uint({name}_strides[2])"


def made(prefix: str, type_name: str, *members: str) -> str:
    """The statement that makes a reader of ``members``."""
    return f"const {type_name} {prefix}_reader = {{{', '.join(members)}}};"
