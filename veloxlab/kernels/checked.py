"""Kernels that are checked against their reference implementations on this device.

Before its first use a kernel and its reference, MLX operations of the codec, run on small random inputs. A kernel that
differs, or that the compiler refuses, is switched off with one warning, and the reference is used instead.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from veloxlab.kernels.backend import Backend, run_vectors, vectors_key
from veloxlab.kernels.devices import CPU, current_backend, device_backend, has_loops
from veloxlab.kernels.vectors import VectorKernel

Array = np.ndarray[Any, Any]
Arrays = mx.array | Sequence[mx.array]

# half precision in levels, queries and weights: 4e-4 seen on an H100, for every width; a wrong table entry gives 1e-2
_TOLERANCE = 3e-3
# a coordinate on a boundary, to float rounding, may be coded either way: a few in 10,000, and one in a word of ten
_SAME_WORDS = 0.99
_TOKENS = 67  # in a trial: a multiple of nothing
_ROWS = 499  # in the trial of a loop
_LARGEST = 8  # whole number in a trial

_states: dict[Hashable, str] = {}  # of each kernel: empty if it agrees, else the difference


def computed(
    kernel: Callable[[Backend], VectorKernel | None],
    reference: Callable[..., dict[str, mx.array]],
    *given: mx.array,
) -> dict[str, mx.array]:
    """Named arrays computed from ``given``, by a kernel of the device or by ``reference``.

    The reference is used if no kernel takes these arrays, or if the kernel does not run or does not agree.
    """
    backend = current_backend()
    if backend is None or not given[0].size:
        return reference(*given)
    made = kernel(backend)
    key = None if made is None else vectors_key(made, backend, *given)
    if made is None or key is None:
        return reference(*given)

    def trial() -> str:
        some = [made_up(array, _TOKENS, seed, whole=made.whole_numbers) for seed, array in enumerate(given)]
        found, wanted = run_vectors(made, backend, *some), reference(*some)
        if made.loss is None:
            return difference(found, wanted)
        lost, least = (_number(made.loss(arrays, *some).sum()) for arrays in (found, wanted))
        return "" if lost <= least * (1 + _TOLERANCE) else f"it loses {lost / least:.3g} times what its reference does"

    if not (backend.lazy or evaluated(*given)) or not agrees(key, made.name, backend, trial):
        return reference(*given)
    found = run_vectors(made, backend, *given)
    return found if backend.lazy else with_derivatives(found, reference, *given)


def by_loop(
    name: str,
    reference: Callable[..., tuple[Array, ...]],
    *given: Array,
    trial: Sequence[Array] = (),
    **options: int,
) -> tuple[Array, ...]:
    """NumPy arrays computed from ``given`` and ``options``, by the loop of this name or by ``reference``.

    The trial has rows of normal numbers, the first indices, or the arrays ``trial``. It does not use the model's
    numbers, because with equal numbers more than one result can be right.
    """
    if not has_loops() or not len(given[0]):
        return reference(*given, **options)
    from veloxlab.kernels.cpu.train import LOOPS  # the import of Numba takes a second

    def differs() -> str:
        first = [array[:_ROWS] if len(array) == len(given[0]) else array for array in given]
        some = trial or [_normal(array, seed) for seed, array in enumerate(first)]
        results = (enumerate(made(*some, **options), 1) for made in (LOOPS[name], reference))
        return difference(*({f"result {i}": mx.array(array) for i, array in arrays} for arrays in results))

    kind = tuple((array.dtype.str, array.shape[1:]) for array in given)
    agreed = agrees((name, kind, tuple(options.items())), name, CPU, differs)
    return (LOOPS[name] if agreed else reference)(*given, **options)


def _normal(array: Array, seed: int) -> Array:
    """Normal numbers in the form of an array, or the array itself if it has whole numbers."""
    if np.issubdtype(array.dtype, np.integer):
        return array
    return np.random.default_rng(seed).standard_normal((len(array), *array.shape[1:])).astype(array.dtype)


def evaluated(*arrays: mx.array) -> bool:
    """Evaluate the arrays; False if they are placeholders inside ``mx.compile`` or ``mx.vmap``."""
    try:
        mx.eval(arrays)
    except ValueError:
        return False
    return True


def begin(*arrays: mx.array) -> None:
    """Start the computation of arrays for an eager kernel, while Python prepares its call; else do nothing."""
    if not device_backend().lazy:
        with suppress(ValueError):  # see `evaluated`
            mx.async_eval(*arrays)


def ahead(*arrays: mx.array) -> None:
    """Start a separate computation of arrays that only some steps have, on a GPU.

    MLX on CUDA makes a graph of each computation. A chain of 60 operations took 591 µs in a form that MLX had seen, and
    900 µs in a new one (H200, MLX 0.32.4).
    """
    if arrays and device_backend().lazy:
        with suppress(ValueError):  # see `evaluated`
            mx.async_eval(*arrays)


def with_derivatives(
    found: Mapping[str, mx.array], reference: Callable[..., dict[str, mx.array]], *given: mx.array
) -> dict[str, mx.array]:
    """The same arrays, with the derivatives of ``reference`` by the ``given`` arrays for ``mx.grad`` and others."""

    def by_graph(*some: mx.array) -> list[mx.array]:
        made = reference(*some)
        return [made[name] for name in found]

    return dict(zip(found, differentiable(by_graph, len(found))(*found.values(), *given), strict=True))


def differentiable(reference: Callable[..., list[mx.array]], count: int = 1) -> Callable[..., list[mx.array]]:
    """A function that returns its first ``count`` arrays, with the derivatives of ``reference`` by the other arrays.

    ``mx.grad`` and others use it. Making it takes longer than calling it.
    """

    def moving(arrays: Sequence[mx.array]) -> list[int]:
        return [place for place, array in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]

    def by_graph(known: Sequence[mx.array]) -> tuple[Callable[..., list[mx.array]], list[int], list[int]]:
        """A function of the arrays with derivatives, their indices in ``known``, and the indices of its results."""
        outputs, inputs = moving(known[:count]), [place + count for place in moving(known[count:])]

        def made(*some: mx.array) -> list[mx.array]:
            arrays = dict(enumerate(known)) | dict(zip(inputs, some, strict=True))
            all_made = reference(*(arrays[place] for place in range(count, len(known))))
            return [all_made[place] for place in outputs]

        return made, inputs, outputs

    def backward(primals: Arrays, cotangents: Arrays, _: Arrays) -> list[mx.array]:
        known, of_outputs = _listed(primals), _listed(cotangents)
        made, inputs, outputs = by_graph(known)
        _, parts = mx.vjp(made, [known[i] for i in inputs], [of_outputs[i] for i in outputs])
        own = dict(zip(inputs, parts, strict=True))
        return [own[i] if i in own else mx.zeros_like(x) for i, x in enumerate(known)]

    def forward(primals: Arrays, tangents: Arrays) -> list[mx.array]:
        known, directions = _listed(primals), _listed(tangents)
        made, inputs, outputs = by_graph(known)
        _, parts = mx.jvp(made, [known[i] for i in inputs], [directions[i] for i in inputs])
        moved = dict(zip(outputs, parts, strict=True))
        return [moved[i] if i in moved else mx.zeros_like(x) for i, x in enumerate(known[:count])]

    function: Any = mx.custom_function(lambda *arrays: list(arrays[:count]))
    function.vjp(backward)
    function.jvp(forward)
    return function  # type: ignore[no-any-return]


def _listed(arrays: Arrays) -> list[mx.array]:
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def agrees(kernel: Hashable, name: str, backend: Backend, trial: Callable[[], str]) -> bool:
    """Whether ``kernel`` agrees with its reference. The first call runs ``trial``, which describes a difference."""
    if not backend.tried:
        return True
    if kernel not in _states:
        try:
            _states[kernel] = trial()
        except Exception as error:  # noqa: BLE001 - what compilers and drivers of other versions raise, or a full disk
            _states[kernel] = f"it does not run ({(str(error).strip() or type(error).__name__).splitlines()[-1][:200]})"
        if _states[kernel]:
            warnings.warn(
                f"The kernel {name} is switched off on this {backend.name} device: {_states[kernel]}. MLX operations "
                "do its work, slower.",
                stacklevel=3,
            )
    return not _states[kernel]


def states() -> dict[str, int]:
    """The number of tried kernels by outcome: ``"agrees"``, or the difference."""
    return dict(Counter(state or "agrees" for state in _states.values()))


def made_up(array: mx.array, tokens: int, seed: int, *, whole: bool = False) -> mx.array:
    """Random bits or normal numbers like ``array``; for ``[B, H, S, n]`` with one batch entry and ``tokens`` tokens."""
    shape = (1, array.shape[1], tokens, array.shape[3]) if array.ndim == 4 else array.shape
    key = mx.random.key(seed)
    if whole:
        return mx.random.randint(-_LARGEST, _LARGEST + 1, shape, key=key).astype(array.dtype)
    if mx.issubdtype(array.dtype, mx.floating):
        return mx.random.normal(shape, key=key).astype(array.dtype)
    bits = mx.random.randint(0, 256, (*shape, array.dtype.size), key=key).astype(mx.uint8)
    return bits.view(array.dtype).reshape(shape)


def difference(found: Mapping[str, mx.array], wanted: Mapping[str, mx.array]) -> str:
    """A description of how ``found`` differs from ``wanted`` beyond rounding; empty if it does not."""
    for name, array in wanted.items():
        if mx.issubdtype(array.dtype, mx.integer):
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
