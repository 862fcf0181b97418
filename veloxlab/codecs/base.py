"""The codec contract: the declarations of an algorithm, and the operations that follow from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

import mlx.core as mx

from veloxlab.checks import Check, check_fields, choice
from veloxlab.codecs.parts.packing import Layout
from veloxlab.codecs.parts.rope import Rope, Start
from veloxlab.codecs.parts.scales import load_scale
from veloxlab.errors import InputError
from veloxlab.kernels.readers import Reader

Made = TypeVar("Made")

TOKENS = 2  # the axis of every array of a code that counts tokens: [B, H, S, ...]
TILE = 1024  # tokens that attention expands at once, so that no decoded history exists


@dataclass(frozen=True)
class Code:
    """The compressed form of ``[B, H, S, D]``: named arrays ``[B, H, S, ...]``, so any code can be joined and sliced.

    ``start`` is the position in the text of the first token of each sequence, one number or an array ``[B]``; only a
    codec that undoes RoPE needs it.
    """

    arrays: dict[str, mx.array]
    start: int | mx.array = 0
    _made: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """The result of ``make``, cached under this name: a layer reads its code at every token."""
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return next(iter(self.arrays.values())).shape[TOKENS]

    @property
    def kv_heads(self) -> int:
        """KV heads: the most of any array, because an array may have one row for all heads."""
        return max(array.shape[1] for array in self.arrays.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    def __getitem__(self, span: slice) -> Code:
        """Tokens ``start:stop`` (not negative), as views."""
        return Code({name: a[:, :, span] for name, a in self.arrays.items()}, self.start + (span.start or 0))


def empty_code(codec: Codec, batch: int = 1, kv_heads: int = 1, dtype: mx.Dtype = mx.float16) -> Code:
    """A code of ``codec`` without tokens, for vectors of type ``dtype``."""
    shapes = {name: (batch, 1 if row.joint else kv_heads, 0, row.count) for name, row in codec.layout.items()}
    return Code({name: mx.zeros(shape, codec.layout[name].dtype or dtype) for name, shape in shapes.items()})


def token_bytes(codec: Codec, kv_heads: int, exact_bytes: int = 2) -> tuple[int, int]:
    """Bytes of codes, and of scales and norms, for one token; an exact number counts as a code."""
    sizes = [0, 0]
    for row in codec.layout.values():
        sizes[row.is_number] += row.nbytes(exact_bytes) * (1 if row.joint else kv_heads)
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Sample:
    """The calibration data of one layer, for `Codec.fit`: keys (after RoPE) or values ``x`` ``[B, H, S, D]``, float32.

    ``queries`` (after RoPE) ``[B, Hq, S, D]`` and ``rope`` are None if the model does not show them. ``start`` is the
    position of the first token of each of the B texts. ``gradients`` ``[B, H, S, D]`` of the model's loss are for
    methods that need them.
    """

    x: mx.array
    queries: mx.array | None = None
    rope: Rope | None = None
    seed: int = 0
    start: int = 0
    gradients: mx.array | None = None


class Codec(ABC):
    """An algorithm, as the cache and attention use it. Shapes: x ``[B, H, S, D]``, q ``[B, Hq, L, D]``.

    A codec codes vectors in its own space: ``decode = from_codes(scale · expand)``. Attention brings a query into that
    space once (`query_to_codes`), and the mix of values out of it once. Codes are expanded tile by tile.

    A codec is a frozen dataclass. Learned parameters are arrays, with one entry for each KV head if the algorithm has
    that; such a codec is compared by identity. All other fields are numbers, words or a `Rope`: see
    `veloxlab.codecs.saving`. Constant tables are built once in a process.

    ``heads_alike``: every KV head has the same code layout, so some heads can be read without others.
    ``expand_scales``: `expand` also scales. ``plan``: the code bits of each coordinate ``[D]``, if they differ.
    ``reaches_by``: for a codec that learns from keys after RoPE, and so fits the positions of its sample alone, the
    option of `veloxlab.calibrate` for texts of N tokens, such as ``"tokens={N}"``.
    """

    head_dim: int
    heads_alike: ClassVar[bool] = False
    expand_scales: ClassVar[bool] = False
    reaches_by: ClassVar[str] = ""
    plan: tuple[int, ...] = ()

    def _check(self, **own: Check) -> None:
        """Check the fields of a new codec that have a `Literal` type, and others by ``own`` checks."""
        check_fields(self, **_words(type(self)), **own)

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The arrays of a code by name: type, and numbers or words a vector."""

    @property
    def bits_per_value(self) -> float:
        """True stored bits per coordinate: codes, scales, norms and padding."""
        return 8 * sum(row.nbytes() for row in self.layout.values()) / self.head_dim

    @property
    def head_plans(self) -> tuple[tuple[int, ...], ...]:
        """``plan`` of each KV head, or one for all; empty if all coordinates have the same bits."""
        return (self.plan,) if self.plan else ()

    @property
    def shared_bytes(self) -> int:
        """Bytes that do not grow with the tokens: tables and learned arrays."""
        return sum(getattr(kept, "nbytes", 0) for kept in vars(self).values())

    @property
    def online(self) -> bool:
        """Whether a cache fits this codec to the first tokens that it packs."""
        return False

    def blank(self, kv_heads: int) -> Self:
        """A codec of the size that this one has when fitted to ``kv_heads`` heads, with zeros as learned arrays."""
        return self

    def heads_of(self, code: Code) -> int:
        """KV heads of a code of this codec."""
        return code.kv_heads

    def fit(self, sample: Sample) -> Self:
        """The codec fitted to calibration data; an algorithm without calibration returns itself."""
        check_vectors(sample.x, self.head_dim)
        return self

    def reach(self, seen: int) -> int | None:
        """The first positions of a text whose keys a fit to the ``seen`` first ones serves; None for all positions."""
        return seen if self.reaches_by else None

    @property
    def code_dim(self) -> int:
        """Dimension of the codec's space: ``head_dim``, unless a subclass has another."""
        return self.head_dim

    @abstractmethod
    def encode(self, x: mx.array, start: Start = 0) -> Code:
        """Compress ``x`` ``[B, H, S, D]`` of any float dtype, whose first tokens are at ``start``; see `Code`."""

    @abstractmethod
    def expand(self, code: Code) -> mx.array:
        """Vectors in the space of the codes ``[B, H, S, D]``, before scaling, float32."""

    def scales(self, code: Code) -> mx.array | None:
        """Factor of each expanded vector ``[B, H, S, 1]``, from the code's ``root_scale``; None for 1."""
        if self.expand_scales:
            return None
        if "root_scale" in code.arrays:
            return load_scale(code.arrays["root_scale"])
        unsaid = [name for name, row in self.layout.items() if row.is_number and row.count == 1]
        if unsaid:
            raise InputError(
                f"{type(self).__name__} stores {unsaid[0]!r} and does not say what it scales: define scales(code), or "
                "write expand_scales = True in the class if expand scales."
            )
        return None

    def from_codes(self, y: mx.array) -> mx.array:
        """Bring vectors ``[B, H, S, D]`` out of the space of the codes; linear."""
        return y

    def query_to_codes(self, q: mx.array) -> mx.array:
        """Bring queries ``[B, H, L, D]`` into that space, so that ``q · from_codes(y) = query_to_codes(q) · y``."""
        return q

    def inner_products(self, q: mx.array) -> Callable[[Code], mx.array]:
        """A function from a tile's code to scores ``[B, H, L, S]``, for queries ``[B, H, L, D]`` in that space."""
        return lambda tile: q @ self.expand(tile).swapaxes(-1, -2)

    def reader(self, code: Code) -> Reader | None:
        """The reader of a kernel for the code, in the codec's space; None if no kernel reads it."""
        return None

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        """Reconstruct ``[B, H, S, D]`` in ``dtype``, by default float32 (for `none` the dtype that came)."""
        y, scale = self.expand(code), self.scales(code)
        return self.from_codes(y if scale is None else y * scale).astype(dtype or mx.float32)

    def scores(self, q: mx.array, code: Code) -> mx.array:
        """``q · decode(code)ᵀ`` ``[B, Hq, L, S]``, float32, from the codes; query heads share KV heads in order."""
        ours = self.query_to_codes(per_kv_head(q.astype(mx.float32), self.heads_of(code)))
        read = self.inner_products(ours)
        parts = [mx.zeros((*ours.shape[:-1], 0))]
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=parts[-1])
            scores, scale = read(tile), self.scales(tile)
            parts.append(scores if scale is None else scores * scale.swapaxes(-1, -2))
        return mx.concatenate(parts, axis=-1).reshape(*q.shape[:-1], code.tokens)

    def mix(self, p: mx.array, code: Code) -> mx.array:
        """``p · decode(code)`` ``[B, Hq, L, D]``, float32, for weights ``p`` ``[B, Hq, L, S]``, read from the codes."""
        weights = per_kv_head(p.astype(mx.float32), self.heads_of(code))
        total = mx.zeros((*weights.shape[:-1], self.code_dim))
        for start in range(0, code.tokens, TILE):
            tile = _tile(code, start, after=total)
            part, scale = weights[..., start : start + TILE], self.scales(tile)
            total = total + (part if scale is None else part * scale.swapaxes(-1, -2)) @ self.expand(tile)
        return self.from_codes(total).reshape(*p.shape[:-1], self.head_dim)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # it never changes


def _tile(code: Code, start: int, after: mx.array) -> Code:
    """The tile from ``start`` on, computed after ``after``: MLX would otherwise expand twenty tiles in parallel."""
    tile = code[start : start + TILE]
    if not start:
        return tile
    arrays = mx.depends(list(tile.arrays.values()), [after])
    return Code(dict(zip(tile.arrays, arrays, strict=True)), tile.start)


@lru_cache
def _words(kind: type) -> dict[str, Check]:
    hints = get_type_hints(kind).items()
    return {name: choice(*get_args(hint)) for name, hint in hints if get_origin(hint) is Literal}


def check_vectors(x: mx.array, head_dim: int) -> None:
    """Raise `InputError` unless ``x`` is ``[B, H, S, head_dim]``."""
    if x.ndim != 4 or x.shape[-1] != head_dim:
        raise InputError(
            f"This codec compresses heads of dimension {head_dim}, in arrays [batch, heads, tokens, {head_dim}], "
            f"and was given {list(x.shape)}: make a codec for that head dimension."
        )


def check_heads(fitted: int, given: int) -> None:
    """Raise `InputError` unless a codec fitted to ``fitted`` KV heads was given as many."""
    if fitted != given:
        raise InputError(
            f"This codec was fitted to {fitted} KV heads and was given {given}: calibrate it on this model, and use it "
            "in the same layer."
        )


def not_fitted(method: str, options: str = "") -> InputError:
    """The error of a codec of ``method`` that is not fitted; ``options`` are those of `veloxlab.calibrate`."""
    return InputError(
        f"{method} must be fitted to activations before it can encode: make calibration = "
        f"vl.calibrate(model, tokenizer, {method.lower()!r}{options}), or call codec.fit(sample)."
    )


def per_kv_head(x: mx.array, kv_heads: int) -> mx.array:
    """``[B, Hq, L, D]`` to ``[B, H, Hq/H · L, D]``: group the queries that read one KV head."""
    batch, heads, length, dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def fitted_online(codec: Codec, x: mx.array) -> Codec:
    """The codec; if it is `Codec.online`, fitted to ``x`` ``[B, H, S, D]``, the first tokens to be packed."""
    return codec.fit(Sample(x.astype(mx.float32))) if codec.online else codec
