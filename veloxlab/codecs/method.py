"""How an algorithm presents itself to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from veloxlab.checks import check_options
from veloxlab.codecs.base import Codec
from veloxlab.errors import InputError

Role = Literal["keys", "values"]
ROLES: tuple[Role, Role] = ("keys", "values")


@dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes
    ----------
    id : the name that users type.
    name : the name as its authors write it.
    paper : authors, year, arXiv id.
    calibrated : whether its codec has to be fitted to activations before it can encode.
    bits : code widths it takes.
    stored : what is kept per vector, in words.
    options : keyword arguments of ``build`` beside head dimension, bits and role.
    build : makes the codec: ``build(head_dim, bits, role, **options)``.
    codecs : classes of the codecs that it makes, by which a saved cache finds them again. Those here are found by their
        file; a method that is registered from elsewhere (`veloxlab.register`) has to name them.
    version : what its codes mean, and what is fitted. Raise it with every change that gives other codes, or another fit
        of the same activations: files of before are then refused, and made again.
    colour : in every chart, such as ``"#3b7dd8"``; None for that of all other caches.
    mark : its point in every chart, by Vega-Lite's name.
    space : of `veloxlab.measure.distributions`, in which it codes and which therefore has its colour and mark.
    per_head : whether it has an option ``head_bits``, a width for each KV head.
    timed : whether `veloxlab speed` times its encoder, which is a kernel.
    """

    id: str
    name: str
    paper: str
    calibrated: bool
    bits: range
    stored: str
    options: tuple[str, ...]
    build: Callable[..., Codec]
    codecs: tuple[type, ...] = ()
    version: int = 1
    colour: str | None = None
    mark: str = "triangle-left"
    space: str | None = None
    per_head: bool = False
    timed: bool = False

    def check(self, bits: int, role: Role, options: Mapping[str, object]) -> None:
        """Raise `InputError` unless ``bits`` and the names of ``options`` are the method's."""
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in self.bits:
            raise InputError(
                f"{role.capitalize()} at bits={bits!r} are out of range: {self.name} takes {_words(self.bits)}."
            )
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InputError(f"{self.name} has no option {unknown[0]!r}. Its options are: {known}.")
        if not self.codecs:  # those of a method from elsewhere mean what it says
            check_options(options)

    def codec(self, head_dim: int, bits: int, role: Role, **options: object) -> Codec:
        """Make the codec, after `check`."""
        self.check(bits, role, options)
        return self.build(head_dim, bits, role, **options)


def _words(bits: range) -> str:
    if bits.step == 1 and len(bits) > 1:
        return f"whole numbers of bits from {bits[0]} to {bits[-1]}"
    *first, last = map(str, bits)
    return f"{', '.join(first)} or {last} bits" if first else f"{last} bits"
