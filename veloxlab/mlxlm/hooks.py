"""How a compressed cache gets into a model's attention.

Models call ``models.base.scaled_dot_product_attention``, most of them by a name of their own. It is replaced in every
module of mlx-lm that holds it. For modules that we do not see, so is ``quantized_scaled_dot_product_attention``, to
which it sends any cache that has ``bits``. Given a `Handle` both let it attend, given anything else the original runs.
mlx-vlm has functions of the same names, which are replaced too once it is imported.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from inspect import signature
from typing import Any, Literal, TypeVar

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

Mask = mx.array | Literal["causal"] | None
Kind = TypeVar("Kind", bound=type)

_LOADABLE: list[type] = []
_pairs: dict[str, list[tuple[Callable[..., mx.array], Callable[..., mx.array]]]] = {}  # by name: originals, and ours


class Handle(ABC):
    """Stands for keys and values in attention; has no methods of arrays, so that arithmetic on keys fails loudly."""

    @abstractmethod
    def attend(self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None) -> mx.array:
        """Softmax attention of queries ``q`` ``[B, Hq, L, Dk]``: ``[B, Hq, L, Dv]`` in ``q``'s dtype.

        ``mask`` is what mlx-lm passes: None, ``"causal"``, or an array that broadcasts to ``[B, Hq, L, S]``, boolean
        (True: attend) or additive. ``sinks`` ``[Hq]`` are logits beside those of the tokens, which have no value.
        """


def loadable(kind: Kind) -> Kind:
    """Let mlx-lm find a cache's class by its name when it loads a saved cache; a decorator of the class."""
    _LOADABLE.append(kind)
    return kind


def _reading_handles(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    names = list(signature(original).parameters)[3:]  # behind queries, keys and values

    def attention(queries: mx.array, keys: Any, values: Any, *more: Any, **named: Any) -> mx.array:  # noqa: ANN401
        if not isinstance(keys, Handle):
            return original(queries, keys, values, *more, **named)
        given = dict(zip(names, more, strict=False)) | named
        return keys.attend(queries, given["scale"], given["mask"], given.get("sinks"))

    return attention


def attach() -> None:
    """Let attention read `Handle` objects, as `make_cache` does; raises RuntimeError where mlx-lm has no such."""
    for name in ("scaled_dot_product_attention", "quantized_scaled_dot_product_attention"):
        if not hasattr(base, name):
            raise RuntimeError(f"This mlx-lm has no models.base.{name}: veloxlab needs mlx-lm 0.32.2 or a later 0.32.")
        pairs = _pairs.setdefault(name, [])
        for held in (getattr(module, name, None) for module in (base, sys.modules.get("mlx_vlm.models.base"))):
            if held is not None and not any(
                held in pair for pair in pairs
            ):  # theirs, or what another library put there
                pairs.append((held, _reading_handles(held)))
        for original, ours in pairs:
            _rebind(original, ours)
    for kind in _LOADABLE:
        setattr(mlx_lm_cache, kind.__name__, kind)


def detach() -> None:
    """Undo `attach`, but where another library has replaced a function since. Caches made before stop working."""
    for pairs in _pairs.values():
        for original, ours in reversed(pairs):
            _rebind(ours, original)


def _rebind(old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("mlx_lm.", "mlx_vlm.")) and module is not None:
            for attribute in [a for a, held in vars(module).items() if held is old]:
                setattr(module, attribute, new)
