"""The tokens of one call: where they are stored, and the check that they can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import mlx.core as mx

from veloxlab.cache.counts import Arrival
from veloxlab.cache.run import Codes
from veloxlab.codecs import TENSORS, Codec
from veloxlab.errors import InputError
from veloxlab.kernels.devices import device_backend
from veloxlab.kernels.slide import Slid

# The largest magnitude that is stored. An unbiased scale is at most 4 times that, and is kept as the float16 of its
# root (`store_scale`): 4·1e9 < 65504².
LARGEST = 1e9


class Largest(NamedTuple):
    """The largest magnitudes of keys or of values; NaN if one is NaN."""

    of_each: mx.array  # sequence [B]
    of_all: mx.array

    @classmethod
    def of(cls, of_each: mx.array) -> Self:
        """Reading a GPU array of more than 8 bytes makes all work wait, so the largest of all is a scalar."""
        return cls(of_each, of_each if of_each.size == 1 else of_each.max())


class Joining(NamedTuple):
    """A token that joins the window: nothing is encoded, and the tokens before it do not change."""

    keys: mx.array
    values: mx.array


class Coming(NamedTuple):
    """Tokens of one call that a cache can store, as `CompressedKVCache.check` found."""

    keys: mx.array
    values: mx.array
    all_seen: bool  # attention reads them as they came; otherwise as they are stored
    arrival: Arrival
    codecs: tuple[Codec, Codec]
    sinks: Codes | None
    packed: Codes | None
    largest: Sequence[Largest]  # of stored tokens that are not checked yet
    slid: Slid | None  # the window without what leaves it, if it is computed already


class Checks:
    """Checks that stored keys and values are numbers that a codec can store, without waiting for a GPU."""

    def __init__(self) -> None:
        self._of_last: Sequence[Largest] = ()  # call, of keys and of values in turn
        self._before: Sequence[Largest] = ()

    def of(self, layer: int, arrays: list[mx.array]) -> tuple[list[mx.array], list[Largest]]:
        """Keys and values, which alternate, and their magnitudes, to be `kept`; raises `InputError` if these are known.

        MLX computes the arrays after their check.
        """
        of_each = [mx.max(mx.abs(x), (1, 2, 3)) for x in arrays]
        if not device_backend().lazy:
            _check(layer, [Largest.of(x) for x in of_each])
            return arrays, []
        return self.after(arrays, of_each)

    def after(self, arrays: list[mx.array], of_each: Sequence[mx.array]) -> tuple[list[mx.array], list[Largest]]:
        """`of` for arrays whose largest magnitudes are known, without a check now."""
        largest = [Largest.of(x) for x in of_each]
        checked: list[mx.array] = mx.depends(arrays, [each.of_all for each in largest]) if arrays else []
        return checked, largest

    def kept(self, largest: Sequence[Largest]) -> None:
        """Record the check of the tokens that a call has stored."""
        self._before, self._of_last = self._of_last, largest

    def only(self, rows: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]) -> Checks:
        """The checks of some entries: indices in the last call but one and in the last, for keys and values in turn."""
        own = Checks()
        for largest, kept in zip((self._before, self._of_last), rows, strict=True):
            own.kept([Largest.of(x.of_each[mx.array([*kept[i // 2]])]) for i, x in enumerate(largest) if kept[i // 2]])
        return own

    def look(self, layer: int) -> None:
        """Raise `InputError` for bad tokens of the last call but one, whose check is computed by now."""
        if self._before:
            _check(layer, self._before)

    def settle(self, layer: int) -> None:
        """Wait for all checks, and raise `InputError` as `look` does."""
        _check(layer, [*self._before, *self._of_last])


def _check(layer: int, largest: Sequence[Largest]) -> None:
    mx.eval([each.of_all for each in largest])
    for i, each in enumerate(largest):
        if not abs(each.of_all.item()) <= LARGEST:  # NaN too
            raise InputError(
                f"Layer {layer}: the {TENSORS[i % 2]} of a token are NaN, infinite or beyond ±{LARGEST:.0e} and cannot "
                "be stored. The model overflowed, most likely in float16: load it in bfloat16 or float32 and start "
                "with a new cache."
            )
