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
from typing import Any, Literal, Self, TypeVar

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from veloxlab.progress import is_endable, may_end

LONG = 16  # tokens in a call from which on each layer is worth a look at whether the work may end
Mask = mx.array | Literal["causal"] | None
Kind = TypeVar("Kind", bound=type)

_LOADABLE: list[type] = []
_OWN: dict[str, Callable[..., mx.array]] = {}  # by what it stands in for: see `stands_in_for`
_replaced: dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]] = {}  # the same: an original, and ours
_pairs: dict[str, list[tuple[Callable[..., mx.array], Callable[..., mx.array]]]] = {}  # by name: originals, and ours


class Handle(ABC):
    """Stands for keys and values in attention, and answers what models ask of them before that.

    It has no other methods of arrays, so that arithmetic on keys fails loudly.
    """

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """Of keys and values as they came."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(B, H, S, D)``; raises AttributeError where keys and values have other dimensions."""

    def astype(self, dtype: mx.Dtype) -> Self:
        """Give itself: attention computes in the queries' dtype or a wider one."""
        return self

    @abstractmethod
    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """Softmax attention of queries ``q`` ``[B, Hq, L, Dk]``: ``[B, Hq, L, Dv]`` in ``q``'s dtype.

        ``mask`` is what mlx-lm passes: None, ``"causal"``, or an array that broadcasts to ``[B, Hq, L, S]``, boolean
        (True: attend) or additive. ``sinks`` ``[Hq]`` are logits beside those of the tokens, which have no value.
        A logit x becomes ``cap · tanh(x / cap)``, before the mask.
        """


class InPlace:
    """A cache that stands in the place of a model's own, for attention that a family computes by itself to know."""


def loadable(kind: Kind) -> Kind:
    """Let mlx-lm find a cache's class by its name when it loads a saved cache; a decorator of the class."""
    _LOADABLE.append(kind)
    return kind


def shape_in_common(lead: tuple[int, ...], key_dim: int, value_dim: int) -> tuple[int, ...]:
    """``(B, H, S, D)`` of a handle, of ``(B, H, S)`` and both head dimensions; AttributeError if these differ."""
    if key_dim != value_dim:
        raise AttributeError(f"Keys of {key_dim} and values of {value_dim} dimensions have no shape in common.")
    return *lead, key_dim


def stands_in_for(name: str) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    """Let a function answer for one of mlx-lm that attends by arithmetic of its own; it gets that one before the rest.

    ``name`` is of a function or method in ``mlx_lm.models``, as ``"gemma2.Attention.__call__"``.
    """

    def kept(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        _OWN[name] = function
        return function

    return kept


def _reading_handles(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    names = list(signature(original).parameters)[3:]  # behind queries, keys and values

    def attention(queries: mx.array, keys: Any, values: Any, *more: Any, **named: Any) -> mx.array:  # noqa: ANN401
        if queries.shape[-2] >= LONG and is_endable():
            mx.eval(queries)  # all layers before this one: a model over a long text is one step otherwise
            may_end()
        if not isinstance(keys, Handle):
            return original(queries, keys, values, *more, **named)
        if not more:
            return keys.attend(queries, named["scale"], named["mask"], named.get("sinks"))
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
            known = any(held in pair for pair in pairs)
            if held is not None and not known:  # theirs, or what another library put there
                pairs.append((held, _reading_handles(held)))
        for original, ours in pairs:
            _rebind(original, ours)
    for name, function in _OWN.items():
        owner, own = _owner(name)
        held = getattr(owner, own, None)
        if held is not None and held not in _replaced.get(name, ()):
            _replaced[name] = held, _answering(function, held)
            setattr(owner, own, _replaced[name][1])
        elif name in _replaced and held is _replaced[name][0]:
            setattr(owner, own, _replaced[name][1])
    for kind in _LOADABLE:
        setattr(mlx_lm_cache, kind.__name__, kind)


def detach() -> None:
    """Undo `attach`, but where another library has replaced a function since. Caches made before stop working."""
    for pairs in _pairs.values():
        for original, ours in reversed(pairs):
            _rebind(ours, original)
    for name, (original, ours) in _replaced.items():
        owner, own = _owner(name)
        if getattr(owner, own, None) is ours:
            setattr(owner, own, original)


def _owner(name: str) -> tuple[object, str]:
    """What has the function of that name, or None if that module is not imported, and its name there."""
    module, *inner = name.split(".")
    owner: object = sys.modules.get(f"mlx_lm.models.{module}")
    for attribute in inner[:-1]:
        owner = getattr(owner, attribute, None)
    return owner, inner[-1]


def _answering(function: Callable[..., mx.array], original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attention(*given: Any, **named: Any) -> mx.array:
        return function(original, *given, **named)

    return attention


def _rebind(old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("mlx_lm.", "mlx_vlm.")) and module is not None:
            for attribute in [a for a, held in vars(module).items() if held is old]:
                setattr(module, attribute, new)
