"""RateQuant: an allocator of bits over a base quantizer; here the codec whose KV heads have different widths.

Paper: *RateQuant: Optimal Mixed-Precision KV Cache Quantization via Rate-Distortion Theory*, F. Zuo, Z. Zhou, H. Cong,
X. Xi, H. F. Leung, 2026, arXiv 2605.06675. The keys of each KV head are one component, and its values another. Each
component has its own width, which `veloxlab.allocate.ratequant` measures and solves for.

Stored per vector of D coordinates
    TurboQuant's data at the head's width bₕ: over a layer b̄ + 16/D bits per value. The codes of all heads of a token
    are one row ``[B, 1, S, words]``, sorted by width, without padding to the widest head. Arrays of one size for all
    heads are ``[B, H, S, …]`` in the same order.

Where we differ
    * Without ``head_bits`` it is TurboQuant at ``bits``, so that a plan may name it for all layers.
    * The base's scale is unbiased for keys and MSE for values; the paper's TurboQuant stores the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from veloxlab.codecs import turboquant
from veloxlab.codecs.base import Code, Codec, check_heads, check_vectors, per_kv_head
from veloxlab.codecs.method import Method, Tensor, own_part
from veloxlab.codecs.parts import constant
from veloxlab.codecs.parts.packing import BITS, Layout, Row
from veloxlab.codecs.parts.rope import Start
from veloxlab.codecs.parts.scales import load_scale
from veloxlab.errors import InputError
from veloxlab.kernels.readers import WidthsReader, head_widths

HeadBits = Sequence[int] | Mapping[str, Sequence[int]]
Base = turboquant.TurboQuant | turboquant.TurboQuantProd
_RAGGED = "codes"  # the array whose rows are as wide as the head's codes


@dataclass(frozen=True)
class RateQuant(Codec):
    """TurboQuant with a width for each KV head, 1 to 8 bits; ``options`` are TurboQuant's own, as pairs."""

    head_dim: int
    head_bits: tuple[int, ...]
    tensor: Tensor
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if not self.head_bits:
            raise InputError("RateQuant was given widths for no KV heads: give one for each, as head_bits=(2, 3, 2).")
        for width in self.head_bits:
            BITS("bits", width)
        _ = self.base  # refuses what it cannot do now, not at the first token

    @cached_property
    def base(self) -> tuple[Base, ...]:
        """A codec for each width in use, ascending."""
        widths, options = sorted(set(self.head_bits)), dict(self.options)
        return tuple(_base(self.head_dim, width, self.tensor, options) for width in widths)

    @cached_property
    def _heads(self) -> list[mx.array]:
        bits = np.array(self.head_bits)
        return [constant(np.flatnonzero(bits == codec.bits), mx.uint32) for codec in self.base]

    @cached_property
    def _words(self) -> list[int]:
        """Words of a vector's codes, by `base`; 0 if the only bit is a sketch."""
        return [codec.layout[_RAGGED].count if _RAGGED in codec.layout else 0 for codec in self.base]

    @property
    def layout(self) -> Layout:
        """The codes of all heads in one row, each at its own width, and the other arrays of the base."""
        words = sum(heads.size * words for heads, words in zip(self._heads, self._words, strict=True))
        codes = {_RAGGED: Row(mx.uint32, words, joint=True)} if words else {}
        return codes | {name: row for name, row in self.base[0].layout.items() if name != _RAGGED}

    @property
    def bits_per_value(self) -> float:
        return sum(self.head_bits.count(codec.bits) * codec.bits_per_value for codec in self.base) / len(self.head_bits)

    @property
    def shared_bytes(self) -> int:
        """Tables of the widths in use; the rotation, which they share, counts for each."""
        return sum(codec.shared_bytes for codec in self.base)

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        check_heads(len(self.head_bits), x.shape[1])
        parts = [codec.encode(x[:, heads], start).arrays for codec, heads in zip(self.base, self._heads, strict=True)]
        rows = [mx.flatten(part[_RAGGED].swapaxes(1, 2), -2) for part in parts if _RAGGED in part]
        codes = {_RAGGED: mx.concatenate(rows, axis=-1)[:, None]} if rows else {}
        others = (name for name in self.layout if name != _RAGGED)
        return Code(codes | {name: mx.concatenate([part[name] for part in parts], axis=1) for name in others}, start)

    def decode(self, code: Code, dtype: mx.Dtype | None = None) -> mx.array:
        return self._in_order([codec.decode(part, dtype) for codec, part in self._parts(code)])

    def scores(self, q: mx.array, code: Code) -> mx.array:
        return self._by_width(q, code, lambda codec, part, own: codec.scores(part, own))

    def mix(self, p: mx.array, code: Code) -> mx.array:
        return self._by_width(p, code, lambda codec, part, own: codec.mix(part, own))

    def expand(self, code: Code) -> mx.array:
        return self._in_order([codec.expand(part) for codec, part in self._parts(code)])

    def scales(self, code: Code) -> mx.array:
        return self._in_order([load_scale(part.arrays["root_scale"]) for _, part in self._parts(code)])

    def from_codes(self, y: mx.array) -> mx.array:
        return self.base[0].from_codes(y)

    def query_to_codes(self, q: mx.array) -> mx.array:
        return self.base[0].query_to_codes(q)

    def reader(self, code: Code) -> WidthsReader | None:
        """Every head's own width and levels; None with the sketch of ``prod``."""
        if self._widths is None:
            return None
        arrays, signs = code.arrays, self.base[0]._signs
        return WidthsReader(self.head_dim, arrays[_RAGGED], arrays["root_scale"], signs, *self._widths)

    @cached_property
    def _widths(self) -> tuple[int, mx.array, mx.array] | None:
        """Widths of the codes for a kernel, cached: every token needs them, and each layer has its own."""
        levels = {b.bits: b._quantizer.paired[1] for b in self.base if isinstance(b, turboquant.TurboQuant)}
        return head_widths(self.head_bits, self.head_dim, levels) if levels else None

    def _by_width(self, x: mx.array, code: Code, attend: Callable[[Base, mx.array, Code], mx.array]) -> mx.array:
        """The result of each codec for the rows of ``x`` ``[B, Hq, L, ·]`` that read its heads, in the heads' order."""
        grouped = per_kv_head(x, len(self.head_bits))
        own = zip(self._parts(code), self._heads, strict=True)
        parts = [attend(codec, grouped[:, heads], part) for (codec, part), heads in own]
        return self._in_order(parts).reshape(*x.shape[:-1], parts[0].shape[-1])

    def _parts(self, code: Code) -> list[tuple[Base, Code]]:
        parts: list[tuple[Base, Code]] = []
        word = head = 0
        for codec, heads, words in zip(self.base, self._heads, self._words, strict=True):
            arrays = {n: a[:, head : head + heads.size] for n, a in code.arrays.items() if n != _RAGGED}
            if words:
                rows = code.arrays[_RAGGED][:, 0, :, word : word + heads.size * words]
                arrays[_RAGGED] = mx.unflatten(rows, -1, (heads.size, words)).swapaxes(1, 2)
            parts.append((codec, Code(arrays, code.start)))
            word, head = word + heads.size * words, head + heads.size
        return parts

    def _in_order(self, parts: list[mx.array]) -> mx.array:
        """Join arrays ``[B, H_b, ...]``, one for each width, into ``[B, H, ...]`` in the order of the heads."""
        joined = mx.concatenate(parts, axis=1)
        in_order = list(self.head_bits) == sorted(self.head_bits)
        return joined if in_order else joined[:, mx.argsort(mx.concatenate(self._heads))]


def build(
    head_dim: int, bits: int, tensor: Tensor, *, head_bits: HeadBits | None = None, **options: object
) -> RateQuant | Base:
    """A codec with ``head_bits``, a list or ``{"keys": [...], "values": [...]}``; without it TurboQuant at ``bits``."""
    own = own_part("head_bits", head_bits, tensor)
    if own is None:
        return _base(head_dim, bits, tensor, options)
    if not isinstance(own, Sequence):
        raise InputError(f"head_bits={own!r} is not a list of widths: give one for each KV head, as head_bits=(2, 3).")
    return RateQuant(head_dim, tuple(own), tensor, tuple(sorted(options.items())))


def _base(head_dim: int, bits: int, tensor: Tensor, options: Mapping[str, object]) -> Base:
    codec = turboquant.build(head_dim, bits, tensor, **options)  # type: ignore[arg-type]
    assert not isinstance(codec, turboquant.TurboQuantSplit)  # RateQuant has no option for outlier channels
    return codec


METHOD = Method(
    id="ratequant",
    name="RateQuant",
    paper="Zuo et al. 2026, arXiv 2605.06675",
    bits=range(1, 9),
    stored="TurboQuant's, with a width for each KV head",
    options=("head_bits", "variant", "scale", "sketch", "rotation", "codebook", "seed"),
    build=build,
    colour="#d9702a",
    mark="square",
    per_head=True,
    timed=True,
)
