"""Kernels of vectors on a CPU: the loop of each kernel, by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
from numba.core.errors import NumbaError

from veloxlab.kernels.cpu import angles, encode, plain, search, sums, trellis
from veloxlab.kernels.cpu.describe import KINDS, Array, address_of, as_bits, hartley
from veloxlab.kernels.cpu.rows import FLOAT32, MSE, NORM, UNBIASED
from veloxlab.kernels.cpu.threads import shared
from veloxlab.kernels.vectors import VectorKernel
from veloxlab.runtime import threads

_SCALES: Final = {"norm": NORM, "mse": MSE, "unbiased": UNBIASED}
_LEAST_SHARE: Final = 1e5  # nanoseconds of work below which another thread costs more than it gains
_PAIR: Final = 0.2  # nanoseconds for a point and a centroid
_STEP: Final = 5  # and for a coordinate and a step of a grid


class Vectors:
    """An array ``[B, H, S, n]`` in the form for loops, see `veloxlab.kernels.cpu.rows`. It keeps the array alive."""

    def __init__(self, array: mx.array) -> None:
        kind, bits = KINDS.get(array.dtype, FLOAT32), as_bits(array)
        mx.eval(bits)
        self._numbers = np.array(bits, copy=False)
        batch, heads, tokens, self.dim = self._numbers.shape
        place = address_of(self._numbers), *self._numbers.strides
        self.count, self.described = batch * heads * tokens, np.array([*place, kind, heads, tokens], np.int64)


class Work(NamedTuple):
    """The inputs of a loop: kernel, tables, given arrays, the same in the form for loops, and outputs."""

    kernel: VectorKernel
    tables: Mapping[str, Array]
    given: Sequence[mx.array]
    vectors: Sequence[Vectors]
    written: Sequence[Array]

    @property
    def scale(self) -> int:
        """The kind of the scale."""
        return _SCALES[str(self.kernel.variant["scale"])]


class Call(NamedTuple):
    """A loop, its arguments after the first and the last vector, and its nanoseconds for a coordinate."""

    loop: Callable[..., None]
    arguments: tuple[Any, ...]
    nanoseconds: float


def run(kernel: VectorKernel, given: Sequence[mx.array]) -> list[mx.array]:
    """Each output of a kernel, ``[B, H, S, numbers]``, for evaluated arrays.

    Raises `RuntimeError` where a loop does not compile.
    """
    vectors = [Vectors(array) for array in given if array.ndim == 4]
    count, lead = vectors[0].count, given[0].shape[:-1]
    written = [_empty(name, count, *row) for name, row in kernel.rows.items()]
    loop, arguments, nanoseconds = _CALLS[kernel.name](Work(kernel, _tables(kernel), given, vectors, written))
    share(lambda first, last: loop(first, last, *arguments), count, vectors[0].dim * nanoseconds)
    return [
        (mx.array(array).view(dtype) if array.dtype == np.uint16 else mx.array(array).astype(dtype)).reshape(*lead, n)
        for array, (n, dtype) in zip(written, kernel.rows.values(), strict=True)
    ]


def share(loop: Callable[[int, int], object], count: int, nanoseconds: float) -> None:
    """Run a loop over ``count`` rows of ``nanoseconds`` each, on the number of threads that is fastest.

    Raises `RuntimeError` where it does not compile.
    """
    parts = min(threads(), int(count * nanoseconds / _LEAST_SHARE))
    try:
        shared(loop, count, parts) if parts > 1 else loop(0, count)
    except NumbaError as error:
        raise RuntimeError(str(error)) from error


def _empty(name: str, vectors: int, count: int, dtype: mx.Dtype) -> Array:
    """The buffer of an output: 16-bit floats as whole numbers, except vectors, which MLX rounds."""
    if mx.issubdtype(dtype, mx.floating):
        return np.empty((vectors, count), np.float32 if name == "out" else np.uint16)
    return np.empty((vectors, count), np.uint32 if dtype == mx.uint32 else np.uint8)


_known: WeakKeyDictionary[VectorKernel, Mapping[str, Array]] = WeakKeyDictionary()


def _tables(kernel: VectorKernel) -> Mapping[str, Array]:
    """The kernel's tables, each contiguous, and the Hartley matrix if it has the signs of a rotation."""
    if kernel not in _known:
        tables = {name: np.ascontiguousarray(np.array(table, copy=False)) for name, table in kernel.tables.items()}
        _known[kernel] = tables | ({"hartley": hartley(len(tables["signs"]))} if "signs" in tables else {})
    return _known[kernel]


def stage_tables(table: Array) -> dict[str, Array]:
    """Tables for `sums` of entries ``[..., 64, D]``, whose real parts come first."""
    real, imaginary = np.split(table, 2, axis=-1)
    both = 2 * table @ np.concatenate([-imaginary, real], axis=-1).swapaxes(-1, -2)
    return {
        "stages": np.ascontiguousarray(table.swapaxes(-1, -2)),
        "norms": np.square(table).sum(axis=-1),
        "both": both,
        "means": both.mean(axis=-1),
    }


def _encode(work: Work) -> Call:
    (x,), tables, widths = work.vectors, work.tables, work.kernel.variant["fields"]
    written = dict(zip(work.kernel.rows, work.written, strict=True))
    numbers = [
        written.pop(name).ravel() if name in written else None for name in ("root_scale", "sine", "residual_norm")
    ]
    below = [sum(widths[i + 1 :]) for i in range(len(widths))]
    packed = zip(written.values(), (*widths, 1), (*below, 0), strict=False)  # the last is for signs, if there are any
    fields = np.array([[address_of(row), row.shape[1], *field] for row, *field in packed], np.int64)
    named = [tables.get(name) for name in ("signs", "hartley", "boundaries", "levels", "stretches", "sketch")]
    by_steps = named[3] is None and named[4] is None
    cost = 5 + by_steps * (_STEP << sum(widths)) + (0 if named[5] is None else _PAIR * len(named[5]))
    return Call(encode.encode, (x.described, x.dim, sum(widths), *named, fields, work.scale, *numbers), cost)


def _encode_angles(work: Work) -> Call:
    (x,), tables, levels, (*packed, radii) = work.vectors, work.tables, work.kernel.variant["levels"], work.written
    fields = [[address_of(row), row.shape[1], b] for row, b in zip(packed, dict.fromkeys(levels), strict=True)]
    arrays = tables.get("signs"), tables.get("hartley"), np.array(levels, np.int64), tables["edges"], tables["circles"]
    return Call(angles.encode_angles, (x.described, x.dim, *arrays, np.array(fields, np.int64), work.scale, radii), 12)


def _rotate(work: Work) -> Call:
    (x,), tables, inverse = work.vectors, work.tables, bool(work.kernel.variant["inverse"])
    return Call(encode.rotate, (x.described, tables["signs"], tables["hartley"], inverse, work.written[0]), 3)


def _encode_signs(work: Work) -> Call:
    (x, y), (signs, root_rms) = work.vectors, work.written
    return Call(plain.encode_signs, (x.described, y.described, x.dim, y.dim, signs, root_rms.ravel()), 6)


def _encode_groups(work: Work) -> Call:
    (x,), (group, steps, bits, shift) = (
        work.vectors,
        (work.kernel.variant[n] for n in ("group", "steps", "bits", "shift")),
    )
    return Call(plain.encode_groups, (x.described, x.dim, group, steps, np.float32(shift), bits, *work.written), 5)


def _encode_by_plan(work: Work) -> Call:
    (x, y), (codes, root_scale) = work.vectors, work.written
    plan = (work.tables[name] for name in ("first_bits", "boundaries", "levels", "mean", "deviation"))
    scale = work.scale, np.float32(work.kernel.variant["largest"])
    return Call(plain.encode_by_plan, (x.described, y.described, *plan, *scale, codes, root_scale.ravel()), 25)


def _encode_sums(work: Work) -> Call:
    (x,), (codes, root_scale), variant = work.vectors, work.written, work.kernel.variant
    order = work.tables["order"]
    # made each time: for all layers they would take much more memory than the learned arrays
    stages = stage_tables(work.tables["table"].astype(np.float32)[..., order])
    cost = 8 * stages["stages"].shape[1]
    options = variant["starts"], variant["rounds"], work.scale, np.float32(variant["largest"])
    return Call(sums.encode_sums, (x.described, order, *stages.values(), *options, codes, root_scale.ravel()), cost)


def _encode_trellis(work: Work) -> Call:
    (x,), tables, variant = work.vectors, work.tables, work.kernel.variant
    given = (tables[name] for name in ("widths", "weights", "headroom", "levels", "backwards"))
    arguments = x.described, *given, np.float32(variant["steps"]), work.written[0]
    return Call(trellis.encode, arguments, variant["states"] / 2)


def _assign(work: Work) -> Call:
    (x,), (parts, bits) = work.vectors, (work.kernel.variant[name] for name in ("parts", "bits"))
    centroids = np.array(work.given[1].astype(mx.float32))
    return Call(search.assign, (x.described, parts, centroids, bits, work.written[0]), _PAIR * len(centroids))


_CALLS: Final[Mapping[str, Callable[[Work], Call]]] = {
    "encode": _encode,
    "encode_angles": _encode_angles,
    "rotate": _rotate,
    "encode_signs": _encode_signs,
    "encode_groups": _encode_groups,
    "encode_by_plan": _encode_by_plan,
    "encode_sums": _encode_sums,
    "encode_trellis": _encode_trellis,
    "assign": _assign,
}
