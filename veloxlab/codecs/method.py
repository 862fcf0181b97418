"""How an algorithm presents itself to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from veloxlab.codecs.codec import Codec
from veloxlab.errors import InputError

Role = Literal["keys", "values"]


@dataclass(frozen=True)
class Method:
    """One algorithm.

    Attributes
    ----------
    id : the name that users type.
    name : the name as its authors write it.
    paper : authors, year, arXiv id.
    calibrated : whether it has to see activations before it can encode.
    bits : code widths it takes.
    stored : what is kept per vector, in words.
    options : keyword arguments of ``build`` beside head dimension, bits and role.
    build : makes the codec: ``build(head_dim, bits, role, **options)``.
    """

    id: str
    name: str
    paper: str
    calibrated: bool
    bits: range
    stored: str
    options: tuple[str, ...]
    build: Callable[..., Codec]

    def check(self, bits: int, role: Role, options: Mapping[str, object]) -> None:
        """Raise `InputError` unless ``bits`` and the names of ``options`` are the method's."""
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in self.bits:
            raise InputError(
                f"{role.capitalize()} at bits={bits!r} are out of range: {self.name} takes whole numbers of bits "
                f"from {self.bits.start} to {self.bits.stop - 1}."
            )
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InputError(f"{self.name} has no option {unknown[0]!r}. Its options are: {known}.")

    def codec(self, head_dim: int, bits: int, role: Role, **options: object) -> Codec:
        """Make the codec, after `check`."""
        self.check(bits, role, options)
        return self.build(head_dim, bits, role, **options)
