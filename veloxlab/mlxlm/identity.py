"""Identity of a model, computed at each call, because weights change in place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

models_here: WeakValueDictionary[int, Module] = WeakValueDictionary()
"""Models with caches made in this process, by id: a module is a dict, which cannot be hashed."""

_SAMPLES = 64  # numbers that are read from an array
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly and match no row length


def name_of(model: Module) -> str:
    """Return family, number of layers and fingerprint of a model, to tell models apart."""
    return f"{type(model).__module__.rpartition('.')[2]} of {len(model.layers)} layers, {fingerprint(model)}"


def fingerprint(model: Module) -> str:
    """Return 16 hex digits over all that decides a model's activations, and so the fit of a calibration or cache.

    The digits cover its `structure`, and 64 numbers of each array. Scaling, training, quantizing, a cast or an adapter
    changes them. An edit of a few numbers can stay undetected. SmolLM2 takes about 20 ms; the time of an array does not
    grow with its size.
    """
    digest = hashlib.sha256(structure(model).encode())
    samples = []
    for array in _arrays(model).values():
        flat = array.reshape(-1)
        if flat.size > _SAMPLES:
            places = (np.arange(_SAMPLES) * _GOLDEN % 1 * flat.size).astype(np.int64)
            flat = flat[mx.array(places)]
        samples.append(flat.view(mx.uint8))
    digest.update(np.array(mx.concatenate(samples)).tobytes())
    return digest.hexdigest()[:16]


def structure(model: Module) -> str:
    """Return hex digits over classes, plain attributes, and names, shapes and dtypes of arrays; takes milliseconds."""
    lines = []
    for name, module in model.named_modules():
        lines.append(f"{name}: {type(module).__module__}.{type(module).__qualname__}")
        for key, value in (vars(module) | module).items():
            if _is_plain(value) and key != "_training":
                lines.append(f"{name}.{key}={value!r}")
    lines += [f"{name} {array.shape} {array.dtype}" for name, array in _arrays(model).items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _arrays(model: Module) -> dict[str, mx.array]:
    """Return parameters, and hidden arrays such as the frequencies of a rotary embedding, in the order of their names.

    Hidden whole numbers, such as the positions of an image, are left out: they depend on the last text.
    """
    found: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        for key, value in (vars(module) | module).items():
            if isinstance(value, mx.array) and key.startswith("_") and mx.issubdtype(value.dtype, mx.floating):
                found[f"{name}.{key}"] = value
    return dict(sorted(found.items()))


@contextmanager
def unchanged(model: Module) -> Iterator[None]:
    """Restore the model's attributes after the block: mlx-vlm's models keep the positions of the last text."""
    before = [(module, dict(module), dict(vars(module))) for _, module in model.named_modules()]
    try:
        yield
    finally:
        for module, items, attributes in before:
            for now, then in ((module, items), (vars(module), attributes)):
                if now.keys() != then.keys() or any(now[name] is not then[name] for name in then):
                    now.clear()
                    dict.update(now, then)  # `Module.update` is a different method


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))
