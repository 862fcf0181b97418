"""Traits of pages that read and set the shared selection, and traits with a check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import traitlets as t

from veloxlab.checks import BITS
from veloxlab.codecs import TENSORS


class Chosen(t.TraitType[Any, Any]):
    """A part of a page's selection as a trait of the page. The selection keeps the value; the page has no copy."""

    def __init__(self, part: str, *, read: str = "", help: str = "") -> None:  # noqa: A002 - traitlets' word
        super().__init__(help=help)
        self.part, self.read = part, read or part

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        return getattr(obj.selection.choice, self.read)

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        obj.selection.choose(**{self.part: value})


class ChosenBits(Chosen):
    """Code bits of a page's keys or values; with an empty ``tensor``, of the tensor that the page shows.

    ``part`` says of which layer: ``"layer"``, the picked layer, which gets bits of its own when they are set;
    ``"shown_layer"``, that layer if it has bits of its own, otherwise all layers; empty for all layers.
    """

    def __init__(self, tensor: str, part: str = "", *, help: str = "") -> None:  # noqa: A002
        super().__init__(part, help=help)
        self.tensor = tensor

    def _of(self, page: Any) -> tuple[int | None, int]:  # noqa: ANN401
        """The layer of these bits (None for all), and their index in a pair (keys, values)."""
        choice = page.selection.choice
        layer = getattr(choice, self.part) if self.part else None
        one = self.part == "layer" or layer in choice.own_bits
        return layer if one else None, TENSORS.index(self.tensor or page.tensor)

    def get(self, obj: Any, cls: Any = None) -> Any:  # noqa: ANN401
        layer, place = self._of(obj)
        return obj.selection.choice.bits_of(layer)[place]

    def set(self, obj: Any, value: Any) -> None:  # noqa: ANN401
        width = BITS(str(self.name), value)
        with obj.selection.lock:
            layer, place = self._of(obj)
            if layer is None:
                obj.selection.choose(**{("key_bits", "value_bits")[place]: width})
            else:
                choice = obj.selection.choice
                bits = [*choice.bits_of(layer)]
                bits[place] = width
                obj.selection.choose(own_bits={**choice.own_bits, layer: tuple(bits)})


class Seeded(t.HasTraits):
    """The seed as a trait of a page."""

    seed = Chosen("seed", help="seed of the random parts of codes and of their calibration")


class OfCache(Seeded):
    """Traits of a page of whole caches; the bits are those of all layers."""

    method = Chosen("method", help="a method's id")
    key_bits = ChosenBits("keys", help="code bits of each coordinate of a key, 1 to 8 by the method, without scales")
    value_bits = ChosenBits(
        "values", help="code bits of each coordinate of a value, 1 to 8 by the method, without scales"
    )
    sinks = Chosen("sinks", help="first tokens of a text, kept exact")
    window = Chosen("window", help="newest tokens of a text, kept exact; up to 32 more wait to be coded together")


class OfLayers(OfCache):
    """Traits of a page of whole caches on which a layer can be picked; the bits are then those of that layer."""

    layer = Chosen("layer", help="the picked layer")
    key_bits = ChosenBits(
        "keys", "layer", help="code bits of a key's coordinates, 1 to 8 by the method, in the picked layer or in all"
    )
    value_bits = ChosenBits(
        "values",
        "layer",
        help="code bits of a value's coordinates, 1 to 8 by the method, in the picked layer or in all",
    )


class Checked(t.Any):
    """A trait with a check of `veloxlab.checks`; raises `InputError` for a value that does not pass it."""

    def __init__(self, check: Callable[[str, object], Any], default: object = t.Undefined, *, help: str = "") -> None:  # noqa: A002
        super().__init__(default, help=help)
        self.check = check

    def validate(self, obj: Any, value: Any) -> Any:  # noqa: ANN401
        return self.check(str(self.name), value)
