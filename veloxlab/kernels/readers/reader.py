"""What a kernel asks of codes: a layout and tables that a codec hands over, so that no kernel knows an algorithm.

A reader is one side (keys or values) of a layer's packed tokens. It gives vectors ``[B, H, S, dim]`` in the space of
the codes. `Reader.expand` says in MLX ops what they are; ``source/read_*.h`` say the same to a GPU. On Metal a kernel
takes 31 arrays, and the strides of one count as another: a reader has room for 7.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import mlx.core as mx

_BANKS = 32  # of threadgroup memory, 4 bytes wide


@dataclass(frozen=True, eq=False)
class Spread:
    """The space that `veloxlab.codecs.parts.transforms.SignedHadamard` leads to; kernels can enter it."""

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


class Room(NamedTuple):
    """Threadgroup memory for a reader's tables: words of 4 bytes, and how many of them a pair of levels takes."""

    words: int
    pair_words: int

    def copies(self, entries: int, pairs: int) -> int:
        """How often ``entries`` of so many ``pairs`` (0: one number) may stand there, a power of two; 1 at least.

        Of as many copies as there are banks every lane has its own.
        """
        copies, words = 1, pairs * self.pair_words or 1
        while 2 * copies * max(pairs, 1) <= _BANKS and 2 * copies * words * entries <= self.words:
            copies *= 2
        return copies


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
    rows : packed codes ``[B, H, S, words]``, uint32, or bytes.
    root_scale : square root of each vector's scale ``[B, H, S, 1]``, float16, or None for 1.
    space : how queries get into the space of the codes and mixes out of it, or None where a kernel cannot do it.
    """

    headers: ClassVar[tuple[str, ...]]  # files of ``source/`` that have the reader
    stored: ClassVar[tuple[str, ...]] = ("rows", "root_scale")  # fields with something for every token, on axis 2

    dim: int
    rows: mx.array
    root_scale: mx.array | None
    space: Spread | None

    @property
    def tokens(self) -> int:
        """S."""
        return self.rows.shape[2]

    @property
    def kv_heads(self) -> int:
        """H."""
        return self.rows.shape[1]

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
    def fragment(self, prefix: str, home: str, room: Room) -> Fragment:
        """Text that makes ``{prefix}_reader``, with its tables in at most as much threadgroup memory as there is room.

        ``home`` is the prefix of the side that has the table, which may be the other one, if both have the same.
        """

    @abstractmethod
    def levels(self) -> mx.array:
        """Vectors before scaling ``[B, H, S, dim]``, float32, by MLX ops."""

    def made_up(self, tokens: int, seed: int) -> Self:
        """The same tables with random codes and scales of one batch entry's ``tokens``, to try a kernel on."""
        keys = mx.random.split(mx.random.key(seed), len(self.stored))
        made_up: dict[str, Any] = {}
        for name, key in zip(self.stored, keys, strict=True):
            array = getattr(self, name)
            made_up[name] = None if array is None else _random(array, tokens, key)
        return replace(self, **made_up)

    def expand(self) -> mx.array:
        """Vectors ``[B, H, S, dim]``, float32: the twin of what a kernel reads."""
        levels = self.levels()
        return levels if self.root_scale is None else levels * mx.square(self.root_scale.astype(mx.float32))


def _random(array: mx.array, tokens: int, key: mx.array) -> mx.array:
    """Random bits, or roots of scales, in the form of ``array`` ``[B, H, S, n]``: ``[1, H, tokens, n]``."""
    shape = (1, array.shape[1], tokens, array.shape[3])
    if array.dtype == mx.float16:
        return mx.random.uniform(0.5, 1.5, shape, key=key).astype(mx.float16)
    if array.dtype == mx.uint8:
        return mx.random.randint(0, 1 << 8, shape, key=key).astype(mx.uint8)
    halves: mx.array = mx.random.randint(0, 1 << 16, (2, *shape), key=key).astype(mx.uint32)
    return halves[0] << 16 | halves[1]


def bits_at(rows: mx.array, first: mx.array, bits: int | mx.array) -> mx.array:
    """Numbers of ``bits`` bits (one width, or ``[n]``) that begin at bits ``first`` ``[n]``, uint32, LSB first.

    ``rows`` are words ``[..., words]`` or bytes; the numbers ``[..., n]``, uint32. One of no bits is 0, wherever it is.
    """
    if rows.dtype == mx.uint8:
        rows = mx.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 4)]).view(mx.uint32)
    last = rows.shape[-1] - 1
    word, shift = first // 32, (first % 32).astype(mx.uint64)
    following = mx.take(rows, mx.minimum(word + 1, last), axis=-1).astype(mx.uint64) << 32
    both = mx.take(rows, mx.minimum(word, last), axis=-1).astype(mx.uint64) | following
    mask = (mx.array(1, mx.uint64) << mx.array(bits, mx.uint64)) - 1
    return ((both >> shift) & mask).astype(mx.uint32)


def at(name: str, head: str = "head") -> str:
    """Where this batch entry's and head's part of the array ``name`` begins."""
    return f"{name} + batch * {name}_strides[0] + {head} * {name}_strides[1]"


def with_stride(name: str, head: str = "head") -> str:
    """Two members of a reader: where this batch entry's and head's part of an array begins, and a token's step."""
    return f"{at(name, head)}, uint({name}_strides[2])"


def scale_arrays(prefix: str, reader: Reader) -> dict[str, mx.array]:
    """The scales among the inputs of a kernel, if there are any."""
    return {} if reader.root_scale is None else {f"{prefix}_scales": reader.root_scale}


def scales(prefix: str, reader: Reader, head: str = "head") -> str:
    """The member of a reader that has the scales."""
    return "{}" if reader.root_scale is None else f"{{{with_stride(prefix + '_scales', head)}}}"


def scales_type(reader: Reader) -> str:
    """The type of that member."""
    return "NoScales" if reader.root_scale is None else "StoredScales"


def made(prefix: str, type_name: str, *members: str) -> str:
    """The statement that makes a reader of ``members``."""
    return f"const {type_name} {prefix}_reader = {{{', '.join(members)}}};"
