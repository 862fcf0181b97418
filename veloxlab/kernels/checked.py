"""Kernels that have shown, on this device, that they agree with their reference implementations.

Before its first use a kernel runs on a little that is made up, and so does the reference: what codecs compute with MLX
operations. A kernel that disagrees, or that the compiler refuses, is switched off with one warning, and the reference
does its work.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping

import mlx.core as mx
import numpy as np

from veloxlab.kernels.backend import Backend
from veloxlab.kernels.devices import current_backend
from veloxlab.kernels.vectors import VectorKernel

# half precision in levels, queries and weights: 4e-4 seen on an H100, for every width; a wrong table entry gives 1e-2
_TOLERANCE = 3e-3
# a coordinate on a boundary, to float rounding, may be coded either way: a few in 10,000, and one in a word of ten
_SAME_WORDS = 0.99
_TOKENS = 67  # of a trial: no multiple of anything
_LARGEST = 8  # whole number in a trial

_states: dict[Hashable, str] = {}  # of each kernel: empty where it agrees, else what is wrong


def computed(
    kernel: Callable[[Backend], VectorKernel | None],
    reference: Callable[..., dict[str, mx.array]],
    *given: mx.array,
) -> dict[str, mx.array]:
    """Named arrays, by a kernel of the device or by ``reference``, which is called with ``given`` too.

    The reference does the work where there is no kernel for such arrays, or none that runs and agrees with it.
    """
    backend = current_backend()
    if backend is None or not given[0].size:
        return reference(*given)
    made = kernel(backend)
    if made is None or not made.takes(backend, *given):
        return reference(*given)

    def trial() -> str:
        some = [made_up(array, _TOKENS, seed, whole=made.whole_numbers) for seed, array in enumerate(given)]
        return difference(made(backend, *some), reference(*some))

    agreed = agrees((made.source(backend, *given), backend), made.name, backend, trial)
    return made(backend, *given) if agreed else reference(*given)


def agrees(kernel: Hashable, name: str, backend: Backend, trial: Callable[[], str]) -> bool:
    """Whether ``kernel`` does what its reference does. The first time ``trial`` says what is wrong, or nothing."""
    if kernel not in _states:
        try:
            _states[kernel] = trial()
        except (RuntimeError, ValueError) as error:  # the compiler's, or the driver's
            _states[kernel] = f"it does not run ({str(error).strip().splitlines()[-1][:200]})"
        if _states[kernel]:
            warnings.warn(
                f"The kernel {name} is switched off on this {backend.name} device: {_states[kernel]}. MLX operations "
                "do its work, slower.",
                stacklevel=3,
            )
    return not _states[kernel]


def states() -> dict[str, int]:
    """How many kernels have been tried on this device, by outcome: ``"agrees"``, or what is wrong."""
    return dict(Counter(state or "agrees" for state in _states.values()))


def made_up(array: mx.array, tokens: int, seed: int, *, whole: bool = False) -> mx.array:
    """Random bits or normal numbers in the form of ``array``: of ``[B, H, S, n]`` one batch entry's ``tokens``."""
    shape = (1, array.shape[1], tokens, array.shape[3]) if array.ndim == 4 else array.shape
    key = mx.random.key(seed)
    if whole:
        return mx.random.randint(-_LARGEST, _LARGEST + 1, shape, key=key).astype(array.dtype)
    if mx.issubdtype(array.dtype, mx.floating):
        return mx.random.normal(shape, key=key).astype(array.dtype)
    bits = mx.random.randint(0, 256, (*shape, array.dtype.size), key=key).astype(mx.uint8)
    return bits.view(array.dtype).reshape(shape)


def difference(found: Mapping[str, mx.array], wanted: Mapping[str, mx.array]) -> str:
    """By what ``found`` differs from ``wanted`` beyond rounding, in words, or nothing."""
    for name, array in wanted.items():
        if mx.issubdtype(array.dtype, mx.unsignedinteger):
            if _number((found[name] == array).mean()) < _SAME_WORDS:
                return f"it writes other {name} than its reference"
            continue
        array = array.astype(mx.float32)
        error = mx.linalg.norm(found[name].astype(mx.float32).reshape(array.shape) - array)
        relative = _number(error / mx.maximum(mx.linalg.norm(array), 1e-9))
        if not relative <= _TOLERANCE:  # NaN differs too
            return f"it differs from its reference by {relative:.1g}"
    return ""


def _number(x: mx.array) -> float:
    return float(np.asarray(x))
