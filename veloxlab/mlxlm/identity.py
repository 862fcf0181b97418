"""What tells one model from another, computed when it is asked for: weights change in place."""

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
"""Models that caches were made for in this process, by id: a module is a dict, which cannot be hashed."""

_SAMPLES = 64  # numbers read of an array
_GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, spread evenly and fall into step with no row length


def name_of(model: Module) -> str:
    """Family, layers and fingerprint of a model, to tell one from another."""
    return f"{type(model).__module__.rpartition('.')[2]} of {len(model.layers)} layers, {fingerprint(model)}"


def fingerprint(model: Module) -> str:
    """Sixteen hex digits over what decides a model's activations, and so what a calibration or a cache is good for.

    That is its `structure`, and 64 numbers of each array: any scaling, training, quantizing, cast or adapter changes
    it. An edit of a few numbers can go unseen. SmolLM2 takes about 20 ms, and a larger model no more for each array.
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
    """Hex digits over a model's classes, plain attributes, and arrays' names, shapes and dtypes; takes milliseconds."""
    lines = []
    for name, module in model.named_modules():
        lines.append(f"{name}: {type(module).__module__}.{type(module).__qualname__}")
        for key, value in (vars(module) | module).items():
            if _is_plain(value) and key != "_training":
                lines.append(f"{name}.{key}={value!r}")
    lines += [f"{name} {array.shape} {array.dtype}" for name, array in _arrays(model).items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _arrays(model: Module) -> dict[str, mx.array]:
    """Parameters, and hidden arrays, such as the frequencies of a rotary embedding, in the order of their names.

    Hidden whole numbers, such as the positions of an image, are of the last text that the model read.
    """
    found: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        for key, value in (vars(module) | module).items():
            if isinstance(value, mx.array) and key.startswith("_") and mx.issubdtype(value.dtype, mx.floating):
                found[f"{name}.{key}"] = value
    return dict(sorted(found.items()))


@contextmanager
def unchanged(model: Module) -> Iterator[None]:
    """What runs inside leaves nothing in the model: mlx-vlm's keep the positions of the text that they read."""
    before = [(module, dict(module), dict(vars(module))) for _, module in model.named_modules()]
    try:
        yield
    finally:
        for module, items, attributes in before:
            for now, then in ((module, items), (vars(module), attributes)):
                if now.keys() != then.keys() or any(now[name] is not then[name] for name in then):
                    now.clear()
                    dict.update(now, then)  # a module's own method is another


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))
