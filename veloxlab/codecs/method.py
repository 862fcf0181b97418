"""The declaration of an algorithm for the registry."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from veloxlab.checks import FLAG, FUNCTION, WORDS, Check, check_fields, check_options, instance, many, maybe, whole
from veloxlab.codecs.base import Codec
from veloxlab.codecs.parts import Floats
from veloxlab.codecs.parts.water_filling import Rows
from veloxlab.errors import InputError

Tensor = Literal["keys", "values"]
TENSORS: tuple[Tensor, Tensor] = ("keys", "values")
_RANGE = instance(range, "a range of code widths, such as range(2, 9)")
_COLOUR = Check("a colour such as '#3b7dd8'", lambda value: re.fullmatch("#[0-9a-fA-F]{6}", value))


class Prediction(NamedTuple):
    """The functions by which an allocation reads a calibration, for a method that plans rows of 32-bit words."""

    variances: Callable[[Any], Floats]  # σ² [H, D] of a fitted codec: twice the nats that a coordinate of 0 bits loses
    rows: Callable[[], Rows]  # bits and losses of each number of words


@dataclass(frozen=True, kw_only=True)
class Method:
    """One algorithm: ``build(head_dim, bits, tensor, **options)`` makes its codec for "keys" or "values".

    A saved cache has the names of its codecs' classes. A method that is registered from elsewhere lists its classes in
    ``codecs``. If the meaning of codes or the fit changes, raise ``version``: older files are then refused. Every chart
    uses ``colour``, such as ``"#3b7dd8"``, and ``mark``, a name of Vega-Lite's. None is the colour of all other caches.
    """

    id: str  # what users type
    name: str  # as its authors write it
    paper: str  # authors, year, arXiv id
    bits: range  # code widths that it takes
    stored: str  # description of the stored data
    build: Callable[..., Codec]
    calibrated: bool = False  # whether its codec has to be fitted before it can encode
    options: tuple[str, ...] = ()
    codecs: tuple[type, ...] = ()
    version: int = 1
    colour: str | None = None
    mark: str = "triangle-left"
    space: str | None = None  # in which it codes, of `veloxlab.measure.distributions`; drawn in its colour
    per_head: bool = False  # whether it has an option ``head_bits``, a width for each KV head
    timed: bool = False  # whether `veloxlab bench --only encode` times its encoder, a kernel
    long_texts: str = ""  # how to get it for keys at any position, in words, if it learns them before RoPE
    fractional: bool = False  # whether ``bits`` may be any number between the least and the most
    planned: Callable[..., Mapping[Any, Any]] | None = None  # plans bits for codecs that are fitted to gradients
    prediction: Prediction | None = None  # of losses, for budgets; needs an option ``words``

    def __post_init__(self) -> None:
        words = "id", "name", "paper", "stored", "mark", "long_texts"
        flags = "calibrated", "per_head", "timed", "fractional"
        check_fields(self, **dict.fromkeys(words, WORDS), **dict.fromkeys(flags, FLAG), bits=_RANGE, build=FUNCTION)
        check_fields(self, options=many(WORDS, empty=True), codecs=many(instance(type, "a class"), empty=True))
        check_fields(self, version=whole(1), colour=maybe(_COLOUR), space=maybe(WORDS), planned=maybe(FUNCTION))
        check_fields(self, prediction=maybe(instance(Prediction, "a veloxlab.codecs.method.Prediction")))

    def takes(self, bits: object) -> bool:
        """Whether ``bits`` are among its own."""
        if self.fractional and isinstance(bits, float):
            return self.bits[0] <= bits <= self.bits[-1]
        return isinstance(bits, int) and not isinstance(bits, bool) and bits in self.bits

    def check(self, bits: float, tensor: Tensor, options: Mapping[str, object]) -> None:
        """Raise `InputError` unless ``bits`` and the names of ``options`` are the method's."""
        if not self.takes(bits):
            widths = f"whole numbers of bits from {self.bits[0]} to {self.bits[-1]}"
            if self.bits.step > 1 or len(self.bits) == 1:
                widths = " or ".join(", ".join(map(str, self.bits)).rsplit(", ", 1)) + " bits"
            if self.fractional:
                widths = f"any bits from {self.bits[0]} to {self.bits[-1]}"
            raise InputError(f"{tensor.capitalize()} at bits={bits!r} are out of range: {self.name} takes {widths}.")
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InputError(f"{self.name} has no option {unknown[0]!r}. Its options are: {known}.")
        if not self.codecs:  # methods from elsewhere check their own
            check_options(options)

    def seeded(self, seed: int) -> dict[str, Any]:
        """Options by which what is random in a codec follows a seed; a fitted one has that of its calibration."""
        return {"seed": seed} if seed and "seed" in self.options and not self.calibrated else {}

    def codec(self, head_dim: int, bits: float, tensor: Tensor, **options: object) -> Codec:
        """Make the codec, after `check`."""
        self.check(bits, tensor, options)
        return self.build(head_dim, bits, tensor, **options)


def own_part(name: str, value: Any, tensor: Tensor) -> Any:  # noqa: ANN401 - as the option is
    """The option ``name`` for ``tensor``: its part of ``{"keys": …, "values": …}``, or the value for both."""
    if not isinstance(value, Mapping):
        return value
    unknown = sorted(set(value) - set(TENSORS), key=str)
    if unknown:
        raise InputError(f"{name} has no part {unknown[0]!r}: give one for 'keys' and one for 'values'.")
    return value.get(tensor)
