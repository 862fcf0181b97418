"""Hooks that let a model's attention read a compressed cache.

Models call ``models.base.scaled_dot_product_attention``, most of them by a name in their own module. `attach` replaces
it in every module of mlx-lm that holds it. It also replaces ``quantized_scaled_dot_product_attention``, for modules
that `attach` does not see: the original sends any cache with ``bits`` there. With a `Handle`, both replacements call
`Handle.attend`; with anything else, the original runs. mlx-vlm has functions of the same names, which are replaced
too after its import. `swiglu_by` replaces the gate of an MLP in a block, for gradients on a CPU.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from types import ModuleType
from typing import Any, Literal, Self, TypeVar

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models import cache as mlx_lm_cache

from veloxlab.progress import is_endable, may_end

LONG = 16  # least tokens of a call for which each layer checks whether the work may end
Mask = mx.array | Literal["causal"] | None
Kind = TypeVar("Kind", bound=type)

_LOADABLE: list[type] = []
_OWN: dict[str, Callable[..., mx.array]] = {}  # by the name of the original: see `stands_in_for`
_replaced: dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]] = {}  # original and replacement, by name
_pairs: dict[str, list[tuple[Callable[..., mx.array], Callable[..., mx.array]]]] = {}  # originals and replacements


class Handle(ABC):
    """Takes the place of keys and values in attention, and answers what models ask of them before that.

    It has no other methods of arrays, so that arithmetic on keys raises an error.
    """

    @property
    @abstractmethod
    def dtype(self) -> mx.Dtype:
        """Dtype of keys and values as they came."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(B, H, S, D)``; raises AttributeError if keys and values have different head dimensions."""

    def astype(self, dtype: mx.Dtype) -> Self:
        """Return itself: attention computes in the queries' dtype or a wider one."""
        return self

    @abstractmethod
    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """Softmax attention of queries ``q`` ``[B, Hq, L, Dk]``; returns ``[B, Hq, L, Dv]`` in ``q``'s dtype.

        ``mask`` is what mlx-lm passes: None, ``"causal"``, or an array that broadcasts to ``[B, Hq, L, S]``, boolean
        (True: attend) or additive. ``sinks`` ``[Hq]`` are logits in addition to those of the tokens; they have no
        value. A logit x becomes ``cap · tanh(x / cap)``, before the mask.
        """


class InPlace:
    """Base of caches that replace a model's own, so that a family's own attention can recognise them."""


def loadable(kind: Kind) -> Kind:
    """Class decorator: lets mlx-lm find a cache's class by its name when it loads a saved cache."""
    _LOADABLE.append(kind)
    return kind


def shape_in_common(lead: tuple[int, ...], key_dim: int, value_dim: int) -> tuple[int, ...]:
    """``(B, H, S, D)`` of a handle from ``(B, H, S)`` and both head dimensions; AttributeError if these differ."""
    if key_dim != value_dim:
        raise AttributeError(f"Keys of {key_dim} and values of {value_dim} dimensions have no shape in common.")
    return *lead, key_dim


def stands_in_for(name: str) -> Callable[[Callable[..., mx.array]], Callable[..., mx.array]]:
    """Register a replacement for a function of mlx-lm; its first argument is the original.

    ``name``: of a function or method in ``mlx_lm.models``, such as ``"gemma2.Attention.__call__"``.
    """

    def kept(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        _OWN[name] = function
        return function

    return kept


_swiglu: ContextVar[Callable[[mx.array, mx.array], mx.array] | None] = ContextVar("swiglu", default=None)


@contextmanager
def swiglu_by(function: Callable[[mx.array, mx.array], mx.array]) -> Iterator[None]:
    """Let models that run in this thread compute mlx-lm's ``swiglu(gate, x)`` with a function."""
    before = _swiglu.set(function)
    try:
        yield
    finally:
        _swiglu.reset(before)


@stands_in_for("activations.swiglu")
def _swiglu_of_context(original: Callable[..., mx.array], gate: mx.array, x: mx.array) -> mx.array:
    return (_swiglu.get() or original)(gate, x)


def _reading_handles(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    names = list(signature(original).parameters)[3:]  # after queries, keys and values

    def attention(queries: mx.array, keys: Any, values: Any, *more: Any, **named: Any) -> mx.array:  # noqa: ANN401
        if queries.shape[-2] >= LONG and is_endable():
            mx.eval(queries)  # all earlier layers; otherwise a long text is one step, which cannot end early
            may_end()
        if not isinstance(keys, Handle):
            return original(queries, keys, values, *more, **named)
        if not more:
            return keys.attend(queries, named["scale"], named["mask"], named.get("sinks"))
        given = dict(zip(names, more, strict=False)) | named
        return keys.attend(queries, given["scale"], given["mask"], given.get("sinks"))

    return attention


def attach() -> None:
    """Let attention read `Handle` objects, as `make_cache` does; raises RuntimeError if mlx-lm lacks a function."""
    for name in ("scaled_dot_product_attention", "quantized_scaled_dot_product_attention"):
        if not hasattr(base, name):
            raise RuntimeError(f"This mlx-lm has no models.base.{name}: veloxlab needs mlx-lm 0.32.2 or a later 0.32.")
        pairs = _pairs.setdefault(name, [])
        for held in (getattr(module, name, None) for module in (base, sys.modules.get("mlx_vlm.models.base"))):
            known = any(held in pair for pair in pairs)
            if held is not None and not known:  # the original, or a replacement by another library
                pairs.append((held, _reading_handles(held)))
        for original, ours in pairs:
            _rebind(original, ours)
    for name, function in _OWN.items():
        owner, own = _owner(name)
        held = getattr(owner, own, None)
        if held is not None and held not in _replaced.get(name, ()):
            _replaced[name] = held, _answering(function, held)
            _put(owner, own, held, _replaced[name][1])
        elif name in _replaced and held is _replaced[name][0]:
            _put(owner, own, held, _replaced[name][1])
    for kind in _LOADABLE:
        setattr(mlx_lm_cache, kind.__name__, kind)


def detach() -> None:
    """Undo `attach`, except where another library replaced a function later. Earlier compressed caches stop working."""
    for pairs in _pairs.values():
        for original, ours in reversed(pairs):
            _rebind(ours, original)
    for name, (original, ours) in _replaced.items():
        owner, own = _owner(name)
        if getattr(owner, own, None) is ours:
            _put(owner, own, ours, original)


def _owner(name: str) -> tuple[object, str]:
    """Return the owner of the named function (None if its module is not imported), and the function's name in it."""
    module, *inner = name.split(".")
    owner: object = sys.modules.get(f"mlx_lm.models.{module}")
    for attribute in inner[:-1]:
        owner = getattr(owner, attribute, None)
    return owner, inner[-1]


def _answering(function: Callable[..., mx.array], original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attention(*given: Any, **named: Any) -> mx.array:
        return function(original, *given, **named)

    return attention


def _put(owner: object, own: str, held: object, new: object) -> None:
    """Replace a method of a class, or a function of a module and of the modules that imported it."""
    if isinstance(owner, ModuleType):
        _rebind(held, new)
    else:
        setattr(owner, own, new)


def _rebind(old: object, new: object) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("mlx_lm.", "mlx_vlm.")) and module is not None:
            for attribute in [a for a, held in vars(module).items() if held is old]:
                setattr(module, attribute, new)
