"""Budgets as people think of them, and what they leave for codes: bytes, and tokens to share them, in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mlx.nn.layers.base import Module

from veloxlab.cache.counts import BLOCK
from veloxlab.checks import Check, check_fields, either, instance, real, whole
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import exact_width, probe

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class LayerSize:
    """Shapes of one layer's keys and values, and how many tokens it sees.

    Attributes
    ----------
    layer, kv_heads, key_dim, value_dim, max_size, keep : as `veloxlab.mlxlm.probe.LayerFacts` has them.
    exact_bits : of an exact value.
    """

    layer: int
    kv_heads: int
    key_dim: int
    value_dim: int
    max_size: int | None
    keep: int
    exact_bits: int

    @property
    def values_per_token(self) -> int:
        """Coordinates of one token's keys and values."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def exact_bytes(self) -> int:
        """Bytes of one exact token."""
        return self.values_per_token * self.exact_bits // 8


def layer_sizes(model: Module) -> tuple[LayerSize, ...]:
    """Sizes of the layers that a compressed cache can take.

    Raises
    ------
    InputError : there are none.
    """
    width = exact_width(model)
    sizes = tuple(
        LayerSize(f.layer, f.kv_heads, f.key_dim, f.value_dim, f.max_size, f.keep, width)
        for f in probe(model)
        if f.compressible
    )
    if not sizes:
        raise InputError("No layer of this model keeps plain keys and values: there is nothing to allocate.")
    return sizes


@dataclass(frozen=True)
class HeldTokens:
    """Tokens of one layer after a text: how many are exact, and how many packed, growth slack included."""

    exact: int
    packed: int


def held_tokens(size: LayerSize, tokens: int, *, sinks: int, window: int, decoded: bool = True) -> HeldTokens:
    """Tokens that the layer's `veloxlab.cache.layer.CompressedKVCache` has room for after ``tokens``, at most.

    With ``decoded`` they came one at a time, and buffers hold slack for more; else in one call, and the numbers are
    exact for a layer that does not slide.
    """
    reach = None if size.max_size is None else size.max_size - size.keep
    first = min(tokens, sinks if reach is None else size.keep)
    behind = tokens - first
    if reach is not None:
        window = min(window, reach // 4)
        behind = min(behind, reach + min(BLOCK, max(1, reach // 8)) - 1)  # forgotten some together
    block = min(BLOCK, max(1, window))
    packed = max(0, behind - window) // block * block
    recent = behind - packed
    if decoded:
        first = min(first + 8, sinks if reach is None else size.keep)
        recent = min(recent + 8, window + block - 1) if recent else 0
        packed += max(8, packed // 64) if packed else 0
    return HeldTokens(first + recent, packed)


@dataclass(frozen=True)
class Limit:
    """What a budget leaves for codes.

    Attributes
    ----------
    tokens : packed tokens of each layer; a layer's codes cost its bytes a token times that.
    nbytes : for the codes of all layers; None where there is a limit to the loss instead.
    predicted_loss : the most that may be lost, or None.
    """

    tokens: Mapping[int, float]
    nbytes: float | None = None
    predicted_loss: float | None = None

    def per_token(self) -> Limit:
        """The same for one token of the layers that hold most: it is one problem for all lengths of a text."""
        most = max(self.tokens.values())
        tokens = {layer: count / most for layer, count in self.tokens.items()}
        return Limit(tokens, None if self.nbytes is None else self.nbytes / most, self.predicted_loss)


@dataclass(frozen=True)
class AverageBits:
    """True bits for each packed value on average, scales included: 3 code bits are 3.25 at a head dimension of 64."""

    bits: float

    def __post_init__(self) -> None:
        check_fields(self, bits=real(above=0))

    def limit(self, sizes: Sequence[LayerSize], sinks: int, window: int) -> Limit:
        """Bytes of one packed token in all layers."""
        values = sum(size.values_per_token for size in sizes)
        return Limit(_one_each(sizes), self.bits * values / 8)


@dataclass(frozen=True)
class BytesPerToken:
    """Bytes of one packed token's keys and values, of all layers."""

    nbytes: float

    def __post_init__(self) -> None:
        check_fields(self, nbytes=real(above=0))

    def limit(self, sizes: Sequence[LayerSize], sinks: int, window: int) -> Limit:
        """The bytes themselves."""
        return Limit(_one_each(sizes), self.nbytes)


@dataclass(frozen=True)
class TokensInMemory:
    """A text of so many tokens in so many megabytes (of 10⁶ bytes): all that the compressed layers then hold.

    Exact sinks and windows, scales, and the slack of buffers that grow are counted. Constant tables (`report`'s
    ``"shared"`` row), and what layers without plain keys and values hold, are not.
    """

    tokens: int
    megabytes: float

    def __post_init__(self) -> None:
        check_fields(self, tokens=whole(1), megabytes=real(above=0))

    def limit(self, sizes: Sequence[LayerSize], sinks: int, window: int) -> Limit:
        """What the exact tokens leave; raises `InputError` if that is nothing."""
        room = self.megabytes * MEGABYTE
        held = {size.layer: held_tokens(size, self.tokens, sinks=sinks, window=window) for size in sizes}
        exact = sum(held[size.layer].exact * size.exact_bytes for size in sizes)
        if not any(h.packed for h in held.values()):
            raise InputError(
                f"{self.tokens} tokens are all kept exact by {sinks} sinks and a window of {window}, in "
                f"{exact / MEGABYTE:.3g} MB: there is nothing to allocate. Take more tokens or a smaller window."
            )
        if room <= exact:
            raise InputError(
                f"{self.megabytes:g} MB are less than the exact tokens take, {exact / MEGABYTE:.3g} MB: give more, or "
                "fewer sinks or a smaller window."
            )
        return Limit({layer: h.packed for layer, h in held.items()}, room - exact)


@dataclass(frozen=True)
class QualityFloor:
    """The fewest bytes at a predicted loss of at most so much: nats a token, by gradients or by divergences."""

    predicted_loss: float

    def __post_init__(self) -> None:
        check_fields(self, predicted_loss=real(above=0))

    def limit(self, sizes: Sequence[LayerSize], sinks: int, window: int) -> Limit:
        """The loss itself."""
        return Limit(_one_each(sizes), predicted_loss=self.predicted_loss)


Budget = AverageBits | BytesPerToken | TokensInMemory | QualityFloor
BUDGET = either(
    instance(get_args(Budget), "vl.AverageBits, vl.BytesPerToken, vl.TokensInMemory or vl.QualityFloor"),
    Check("a number of true bits above 0", lambda value: AverageBits(real(above=0).read(value))),
)
"""A budget, or a number of true bits."""


def _one_each(sizes: Sequence[LayerSize]) -> dict[int, float]:
    return {size.layer: 1.0 for size in sizes}
