"""The step in which a block of tokens leaves a window of exact ones: one launch instead of a dozen operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from veloxlab.kernels.backend import Backend, few_numbers, launch, suited
from veloxlab.kernels.checked import agrees, difference, made_up
from veloxlab.kernels.text import Source, source_file

_THREADS = 512
_OUTPUTS = ("next_keys", "next_values", "largest_key", "largest_value")


class Slid(NamedTuple):
    """Windows of keys and of values ``[B, H, room, D]``, and the largest magnitudes of the tokens that left them."""

    windows: Sequence[mx.array]
    largest: Sequence[mx.array]  # of each sequence [B] float32; NaN if one of its numbers is NaN


def slid(windows: Sequence[mx.array], oldest: int, tokens: int, room: int, backend: Backend) -> Slid | None:
    """Drop the ``oldest`` of the ``tokens`` in windows of keys and of values; zeros fill the ``room``.

    None if no kernel takes these arrays.
    """
    key = *(x.dtype for x in windows), *(x.shape[-1] for x in windows), room
    if any(x.dtype not in backend.types for x in windows):
        return None

    def launched(windows: Sequence[mx.array], oldest: int, tokens: int) -> Slid:
        batch, heads = windows[0].shape[:2]
        made = launch(
            _source(*key, backend),
            suited([*windows, few_numbers([oldest, tokens])], backend),
            backend=backend,
            groups=(2 * batch * (heads + 1), 1, 1),
            threads=_THREADS,
            shapes=[*((*x.shape[:2], room, x.shape[3]) for x in windows), (batch,), (batch,)],
            types=[*(x.dtype for x in windows), mx.float32, mx.float32],
        )
        return Slid(made[:2], made[2:])

    def trial() -> str:
        some = [made_up(x, room, seed) for seed, x in enumerate(windows)]
        both = launched(some, room // 3, room), by_operations(some, room // 3, room, room)
        return difference(*(dict(zip(_OUTPUTS, [*each.windows, *each.largest], strict=True)) for each in both))

    return launched(windows, oldest, tokens) if agrees(("slide", *key, backend), "slide", backend, trial) else None


def by_operations(windows: Sequence[mx.array], oldest: int, tokens: int, room: int) -> Slid:
    """The reference of `slid`."""
    left = [mx.pad(x[:, :, oldest:tokens], [(0, 0), (0, 0), (0, room - tokens + oldest), (0, 0)]) for x in windows]
    return Slid(left, [mx.abs(x[:, :, :oldest]).max((1, 2, 3)).astype(mx.float32) for x in windows])


@lru_cache
def _source(
    key_type: mx.Dtype, value_type: mx.Dtype, key_dim: int, value_dim: int, room: int, backend: Backend
) -> Source:
    return Source(
        name="slide",
        inputs=("keys", "values", "counts"),
        outputs=_OUTPUTS,
        defines=(("KEY_DIM", key_dim), ("VALUE_DIM", value_dim), ("ROOM", f"{room}u"), ("THREADS", f"{_THREADS}u")),
        headers=("slide.h",),
        body=source_file("slide.metal"),
    )
