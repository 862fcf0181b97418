"""Tokens of one call: where they go, and whether they can be stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from veloxlab.cache.counts import Arrival
from veloxlab.cache.runs import Codes
from veloxlab.codecs import TENSORS, Codec
from veloxlab.errors import InputError
from veloxlab.kernels.devices import device_backend

# The largest magnitude that is stored. An unbiased scale is at most 4 times that, and is kept as the float16 of its
# root (`store_scale`): 4·1e9 < 65504².
LARGEST = 1e9
Largest = Sequence[mx.array]  # magnitudes, by head [B, H], of keys and of values in turn


class Joining(NamedTuple):
    """A token that joins the window: nothing is encoded, and what comes before stays."""

    keys: mx.array
    values: mx.array


class Coming(NamedTuple):
    """Tokens of one call that a cache can store, as `CompressedKVCache.check` found."""

    keys: mx.array
    values: mx.array
    all_seen: bool  # attention reads them as they came, else as they are stored
    arrival: Arrival
    codecs: tuple[Codec, Codec]
    sinks: Codes | None
    packed: Codes | None
    largest: Largest  # magnitudes of what is stored, where it is not known yet whether that can be


class Checks:
    """Whether keys and values that were stored are numbers that a codec can store; a GPU is not waited for to know."""

    def __init__(self) -> None:
        self._of_last: Largest = ()  # call
        self._before: Largest = ()

    def of(self, layer: int, arrays: list[mx.array]) -> tuple[list[mx.array], Largest]:
        """Keys and values, which alternate, and what is to be `kept` of them; raises `InputError` where that is known.

        They are computed after their check.
        """
        largest = [mx.max(mx.abs(x), (2, 3)) for x in arrays]  # of each head; NaN where one is
        if not device_backend().lazy:
            _check(layer, largest)
            return arrays, []
        checked: list[mx.array] = mx.depends(arrays, largest)
        return checked, largest

    def kept(self, largest: Largest) -> None:
        """The check of what a call has stored."""
        self._before, self._of_last = self._of_last, largest

    def only(self, rows: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]) -> Checks:
        """Those of some entries of the last call but one, and of the last: which, of each keys and values in turn."""
        own = Checks()
        for largest, kept in zip((self._before, self._of_last), rows, strict=True):
            own.kept([x[mx.array([*kept[i // 2]])] for i, x in enumerate(largest) if kept[i // 2]])
        return own

    def look(self, layer: int) -> None:
        """Raise `InputError` for what the call before the last stored, which has been computed by now."""
        if self._before:
            _check(layer, self._before)

    def settle(self, layer: int) -> None:
        """Wait for all of it, and raise `InputError` as `look` does."""
        _check(layer, [*self._before, *self._of_last])


def _check(layer: int, largest: Largest) -> None:
    mx.eval(largest)
    for i, each in enumerate(largest):
        if not (np.array(each.tolist()) <= LARGEST).all():  # which is false for NaN too
            raise InputError(
                f"Layer {layer}: the {TENSORS[i % 2]} of a token are NaN, infinite or beyond ±{LARGEST:.0e} and cannot "
                "be stored. The model overflowed, most likely in float16: load it in bfloat16 or float32 and start "
                "with a new cache."
            )
