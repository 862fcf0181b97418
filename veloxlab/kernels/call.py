"""The arguments of attention, and the arrays that its kernel gets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import mlx.core as mx

from veloxlab.kernels.readers import Reader

STEP = 16  # coordinates that dimensions are multiples of
_MOST_CONSTANTS = 1024  # numbers of a table that is joined with others: an array takes 0.3 µs of each launch
_CONSTANT_STEP = 4  # numbers to whose multiples tables are aligned

Answer = tuple[mx.array, mx.array | None]  # of attention; see `PreparedCall`


class Exact:
    """Consecutive exact tokens: the first ones of keys ``[B, H, S, Dk]`` and values ``[B, H, S, Dv]`` of one dtype.

    The arrays are buffers with ``room`` for tokens, of which the first ``tokens`` are used. The newest token may be
    ``coming``: its key and value ``[B, H, 1, D]`` are not in the ``buffers`` yet. A kernel of attention writes it
    there (`joined`), which saves two launches; whoever else needs the buffers gets them with the token.
    """

    def __init__(
        self,
        keys: mx.array,
        values: mx.array,
        tokens: int | None = None,
        room: int | None = None,
        coming: tuple[mx.array, mx.array] | None = None,
    ) -> None:
        self.buffers, self.coming = (keys, values), coming
        self.room: int = keys.shape[2] if room is None else room
        self.tokens: int = self.room if tokens is None else tokens

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of all numbers."""
        return self.buffers[0].dtype

    @property
    def keys(self) -> mx.array:
        """The buffer of keys, with all tokens."""
        return self.complete()[0]

    @property
    def values(self) -> mx.array:
        """The buffer of values, with all tokens."""
        return self.complete()[1]

    def complete(self) -> tuple[mx.array, mx.array]:
        """The buffers, with the newest token in them."""
        if self.coming is not None:
            newest = slice(self.tokens - 1, self.tokens)
            for buffer, new in zip(self.buffers, self.coming, strict=True):
                buffer[:, :, newest] = new
            self.coming = None
        return self.buffers

    def parted(self) -> Exact:
        """The same tokens, of which the newest is coming: its place in the buffers is 0."""
        at = (mx.arange(self.room) == self.tokens - 1)[:, None]
        keys, values = (mx.where(at, mx.zeros_like(x), x) for x in self.complete())
        new = [x[:, :, self.tokens - 1 : self.tokens] for x in self.complete()]
        return Exact(keys, values, self.tokens, self.room, (new[0], new[1]))

    def joined(self, keys: mx.array, values: mx.array) -> None:
        """Take the buffers that a kernel has written, with the newest token in them."""
        self.buffers, self.coming = (keys, values), None


@dataclass(frozen=True, eq=False)
class Tokens:
    """A layer's tokens: packed ones, and exact ones before and after them."""

    keys: Reader
    values: Reader
    sinks: Exact | None
    recent: Exact | None
    key_dim: int
    value_dim: int

    @property
    def exact_counts(self) -> tuple[int, int]:
        """Tokens before and after the packed ones."""
        sinks, recent = (0 if run is None else run.tokens for run in (self.sinks, self.recent))
        return sinks, recent

    @property
    def exact_type(self) -> mx.Dtype:
        """The dtype of the exact tokens; float32 without any."""
        some = self.sinks or self.recent
        return mx.float32 if some is None else some.dtype

    @property
    def joins(self) -> bool:
        """Whether the newest token is not in its buffers yet."""
        return self.recent is not None and self.recent.coming is not None

    @property
    def one_table(self) -> bool:
        """Whether keys and values have the same table."""
        return self.keys.lookup is not None and self.keys.lookup is self.values.lookup


@dataclass(eq=False, slots=True)
class Queries:
    """The queries of attention, and how their scores are computed."""

    q: mx.array  # [B, Hq, L, Dk]
    scale: float  # factor of the scores
    coded: mx.array | None = None  # q in the space of the keys' codes [B, H, Hq/H · L, keys.dim] float32, if by a codec
    mask: mx.array | None = None  # added to the scores [B, Hq, L, S] float32
    logits: mx.array | None = None  # extra logit in each head's softmax, without a value [Hq] float32
    cap: float | None = None  # a score x becomes cap · tanh(x / cap), before the mask

    @property
    def kind(self) -> tuple[float, float | None, bool, bool]:
        """The key of a kernel beside shapes and types: scale, cap, no mask, no logits."""
        return self.scale, self.cap, self.mask is None, self.logits is None


class PreparedCall(Protocol):
    """Attention over a layer's tokens, of which only the recent ones change.

    The result is ``[B, Hq, L, Dv]`` in the queries' dtype or float32. If values are not rotated back, there is also the
    packed tokens' part in the space of their codes ``[B, H, Hq/H · L, values.dim]`` float32, to be transformed and
    added.
    """

    def __call__(self, queries: Queries, recent: Exact | None, packed: int | None = None, /) -> Answer:
        """On a GPU only the first ``packed`` tokens of the arrays are used, if given."""


class AttentionKernel(Protocol):
    """Computes attention for calls of one kind."""

    @property
    def name(self) -> str:
        """The name in messages."""

    def __hash__(self) -> int:
        """The hash of the kind of call."""

    def prepared(self, queries: Queries, tokens: Tokens) -> PreparedCall:
        """A function for calls like this one, with other queries and recent tokens."""


def changing_names(queries: Queries, *, rotates: bool, joins: bool) -> tuple[str, ...]:
    """The inputs of ``attend.metal`` that change at each token; they come first. With a mask queries are contiguous.

    A kernel ``rotates`` queries itself, or it also gets them in the space of the keys' codes.
    """
    names = *(("q",) if rotates else ("q", "q_coded")), "recent_keys", "recent_values", "common", "sizes"
    if joins:
        return *names, "new_keys", "new_values"
    return names if queries.mask is None else (*names, "mask")


def lasting_inputs(tokens: Tokens) -> dict[str, mx.array]:
    """The inputs that do not change at each token, by name; small tables are joined as ``constants``."""
    sinks = tokens.sinks or nothing_of(tokens.exact_type)
    small = _small_tables(tokens)
    arrays = {**tokens.keys.arrays("k"), **tokens.values.arrays("v")}
    if tokens.one_table:
        del arrays["v_table"]
    others = {name: array for name, array in arrays.items() if name not in small}
    parts = [mx.pad(mx.flatten(table), (0, -table.size % _CONSTANT_STEP)) for table in small.values()]
    constants = {"constants": mx.concatenate(parts)} if parts else {}
    return {**others, "sink_keys": sinks.keys, "sink_values": sinks.values, **constants}


def places_of_constants(tokens: Tokens) -> dict[str, str]:
    """Text for each small table: its place among the ``constants``."""
    places, at = {}, 0
    for name, table in _small_tables(tokens).items():
        places[name] = f"(constants + {at})"
        at += table.size + -table.size % _CONSTANT_STEP
    return places


def _small_tables(tokens: Tokens) -> dict[str, mx.array]:
    of_readers = {
        f"{prefix}_{name}": getattr(reader, name)
        for prefix, reader in (("k", tokens.keys), ("v", tokens.values))
        for name in (*reader.joined_tables, "signs")
        if not (tokens.one_table and (prefix, name) == ("v", "table"))
    }
    return {n: table for n, table in of_readers.items() if table is not None and table.size <= _MOST_CONSTANTS}


@lru_cache
def nothing_of(dtype: mx.Dtype) -> Exact:
    """A placeholder for exact tokens of a dtype."""
    empty = mx.zeros((1, 1, 1, STEP), dtype)
    mx.eval(empty)
    return Exact(empty, empty)
