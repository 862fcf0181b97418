"""The one place that touches mlx-lm's internals: how a compressed cache gets into a model's attention.

mlx-lm sends a cache that has ``bits`` to ``models.base.quantized_scaled_dot_product_attention``, which it looks up in
its module at every call. Replacing that one name serves every model that uses mlx-lm's attention function, whatever the
import order: given a `Handle` we attend, given anything else the original runs. Which layers take that path is found
out by a dry run of one token that builds the graph and computes nothing.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache

from veloxlab.attention import Handle, Mask
from veloxlab.cache import DEFAULT_CHUNK, DEFAULT_SINKS, DEFAULT_WINDOW, Chunk, CompressedKVCache, Path
from veloxlab.codecs import Role, find_method
from veloxlab.codecs.method import Calibrated, layer_codec
from veloxlab.codecs.rope import Rope
from veloxlab.errors import InputError

DEFAULT_BITS = 4
ROPE_NAMES = ("rope", "rotary_emb")
_FINGERPRINTED = 64  # numbers of an array that a fingerprint reads: so many or up to twice that, spread evenly
_HOOK = "quantized_scaled_dot_product_attention"


# the hook -------------------------------------------------------------------------------------------------------------


def attach() -> None:
    """Let mlx-lm's attention read `Handle` objects. Done by `make_cache`; doing it again changes nothing."""
    if not hasattr(base, _HOOK):
        raise RuntimeError(f"This mlx-lm has no models.base.{_HOOK}: veloxlab needs mlx-lm 0.32.2 or a later 0.32.")
    original = getattr(base, _HOOK)
    if hasattr(original, "before_veloxlab"):
        return

    def attention(
        queries: mx.array, q_keys: object, q_values: object, scale: float, mask: Mask, **kw: object
    ) -> mx.array:
        if isinstance(q_keys, Handle):
            return q_keys.attend(queries, scale, mask)
        array: mx.array = original(queries, q_keys, q_values, scale=scale, mask=mask, **kw)
        return array

    attention.before_veloxlab = original  # type: ignore[attr-defined]
    setattr(base, _HOOK, attention)


def detach() -> None:
    """Undo `attach`, if no other library has replaced the function since. Caches made before stop working."""
    original = getattr(getattr(base, _HOOK, None), "before_veloxlab", None)
    if original is not None:
        setattr(base, _HOOK, original)


# the dry run ----------------------------------------------------------------------------------------------------------


@dataclass
class LayerFacts:
    """What a dry run learned of one entry of a model's prompt cache.

    Attributes
    ----------
    layer : index in the prompt cache.
    native : class name of the model's own cache.
    compressible : whether the layer keeps all its keys and values in a plain ``KVCache``.
    kv_heads, key_dim, value_dim : of its keys and values; 0 where there are none.
    path : how attention reads a compressed cache there.
    reason : why, in words.
    """

    layer: int
    native: str
    compressible: bool
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    path: Path = "codes"
    reason: str = "attention reads the codes"


@dataclass
class _Probe(Handle):
    """Stands in for a cache and for the handle it gives: notes the shapes that pass and answers with zeros."""

    facts: LayerFacts
    offset: int = 0
    fetched: bool = False
    attended: bool = False
    values: mx.array = field(default_factory=lambda: mx.zeros(0))

    def __post_init__(self) -> None:
        if self.facts.path == "codes":
            self.bits, self.group_size = 0, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self.facts.kv_heads, self.facts.key_dim, self.facts.value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
        self.fetched, self.values, self.offset = True, values, keys.shape[2]
        return (self, self) if self.facts.path == "codes" else (keys, values)

    def attend(self, q: mx.array, scale: float, mask: Mask) -> mx.array:
        self.attended = True
        return mx.zeros((*q.shape[:-1], self.values.shape[-1]), q.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        return None


_known: dict[int, list[LayerFacts]] = {}  # by id: a module is a dict, which cannot be hashed


def probe(model: Module) -> list[LayerFacts]:
    """Facts of every entry of the model's prompt cache, from a dry run of one token that computes nothing.

    Raises
    ------
    InputError : if the model fails whatever its caches hand out.
    """
    if id(model) not in _known:
        attach()
        facts = [
            LayerFacts(i, type(c).__name__, type(c) is KVCache, reason=f"the model's own {type(c).__name__} is kept")
            for i, c in enumerate(make_prompt_cache(model))
        ]
        for layer in facts:
            if layer.compressible:
                layer.reason = LayerFacts.reason
        _dry_run(model, facts)
        _known[id(model)] = facts
        weakref.finalize(model, _known.pop, id(model), None)
    return _known[id(model)]


def _dry_run(model: Module, facts: list[LayerFacts]) -> None:
    """Run one token until no layer fails, moving a layer that does from codes to arrays."""
    for _ in range(len(facts) + 1):
        native = make_prompt_cache(model)
        caches = [_Probe(f) if f.compressible else own for f, own in zip(facts, native, strict=True)]
        probes = [c for c in caches if isinstance(c, _Probe)]
        try:
            model(mx.array([[0]]), cache=caches)
        except Exception as error:  # a model may fail on a handle in any way: that is the question
            culprit = next((p for p in reversed(probes) if p.fetched and p.facts.path == "codes"), None)
            if culprit is None:
                raise InputError(
                    f"This model ({type(model).__module__}) does not run on one token with its own caches: {error}"
                ) from error
            culprit.facts.path = "arrays"
            culprit.facts.reason = f"its attention takes arrays only ({type(error).__name__}: {error})"
            continue
        silent = [p for p in probes if p.fetched and p.facts.path == "codes" and not p.attended]
        if not silent:
            break
        for p in silent:
            p.facts.path, p.facts.reason = "arrays", "its attention does not go through mlx-lm's own function"
    for p in probes:
        if not p.fetched:
            p.facts.compressible, p.facts.reason = False, "the layer stores no keys and values of its own"


def rope_of(model: Module, layer: int) -> Rope | None:
    """The rotary embedding of a layer's keys, or None where none is found or it is of a kind that is not known.

    What is given was tried: undoing the layer's own rotation gives back the vector, up to a constant factor.
    """
    block = model.layers[layer]
    module = next((m for name, m in block.named_modules() if name.split(".")[-1] in ROPE_NAMES), None)
    if module is None or not hasattr(module, "dims"):
        return None
    rope = Rope(
        dims=module.dims,
        traditional=module.traditional,
        base=getattr(module, "base", None) if isinstance(module, nn.RoPE) else None,
        freqs=getattr(module, "_freqs", None),
        scale=getattr(module, "scale", 1.0) if isinstance(module, nn.RoPE) else 1.0,
    )
    x = mx.random.normal((1, 1, 3, module.dims), key=mx.random.key(0))
    back = rope.inverse(module(x, offset=7), 7)
    factor = mx.linalg.norm(back) / mx.linalg.norm(x)
    return rope if mx.allclose(back, x * factor, atol=1e-3).item() else None


def fingerprint(model: Module) -> str:
    """Sixteen hex digits over what decides a model's activations, and so what a calibration of it is good for.

    That is the names, shapes and some numbers of its parameters, and of its modules all plain numbers and hidden
    arrays: base, scale and frequencies of a rotary embedding are no parameters.
    """
    digest = hashlib.sha256()
    arrays: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    for name, module in model.named_modules():
        for key, value in sorted((vars(module) | module).items()):
            if isinstance(value, mx.array) and key.startswith("_"):
                arrays.append((f"{name}.{key}", value))
            elif isinstance(value, int | float | str) and key != "_training":
                digest.update(f"{name}.{key}={value!r}\n".encode())
    for name, array in arrays:
        flat = array.reshape(-1)
        some = flat[:: max(1, flat.size // _FINGERPRINTED)].astype(mx.float32)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(np.array(some).tobytes())
    return digest.hexdigest()[:16]


# attaching a cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSettings:
    """How one layer's cache is to be made: a method and code bits for keys and for values, and the method's options."""

    key_method: str
    key_bits: int
    value_method: str
    value_bits: int
    options: dict[str, object] = field(default_factory=dict)


class LayerPlan(Protocol):
    """Settings for every layer of a model, such as a `veloxlab.Plan`."""

    @property
    def sinks(self) -> int: ...  # noqa: D102 - as for `make_cache`
    @property
    def window(self) -> int: ...  # noqa: D102
    @property
    def chunk(self) -> Chunk: ...  # noqa: D102

    def settings_for(self, model: Module) -> Sequence[LayerSettings]:
        """One entry per entry of the prompt cache; raises `InputError` for another model's plan."""


class ModelCalibration(Calibrated, Protocol):
    """Codecs fitted to one model, such as a `veloxlab.Calibration`."""

    def check_model(self, model: Module) -> None:
        """Raise `InputError` unless the codecs were fitted to ``model``."""


def make_cache(
    model: Module,
    method_or_plan: str | LayerPlan = "turboquant",
    *,
    bits: int | None = None,
    key_bits: int | None = None,
    value_bits: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    chunk: Chunk | None = None,
    calibration: ModelCalibration | None = None,
    **options: object,
) -> list[Any]:
    """Make a compressed prompt cache for ``model``: a list with one cache per layer, for ``prompt_cache=``.

    Layers that hold no plain keys and values (state-space, convolution, sliding-window layers) keep the model's own.

    Parameters
    ----------
    model : any mlx-lm model.
    method_or_plan : a method's id (`veloxlab.methods`), or a `veloxlab.Plan`, which says which bits each layer gets.
    bits, key_bits, value_bits : code bits per coordinate, 4 by default; the last two override the first.
    sinks, window : tokens kept exact, at the start and at the end; 4 and 64 by default, or the plan's.
    chunk : whether tokens of one call attend to one another ``"exact"`` or through their ``"codes"``; the former by
        default, or the plan's.
    calibration : what `veloxlab.calibrate` gave, for a method that has to be fitted.
    options : the method's own, such as ``variant="prod"`` or ``rotation="haar"``.

    Raises
    ------
    InputError : unknown method or option, bits out of range, a plan or a calibration for another model, bits beside a
        plan.
    """
    if calibration is not None:
        calibration.check_model(model)
    if isinstance(method_or_plan, str):
        width = bits or (_exact_width(model) if method_or_plan == "none" else DEFAULT_BITS)
        uniform = LayerSettings(
            method_or_plan,
            width if key_bits is None else key_bits,
            method_or_plan,
            width if value_bits is None else value_bits,
            options,
        )
        settings: Sequence[LayerSettings] = [uniform] * len(probe(model))
        exact: tuple[int, int, Chunk] = (DEFAULT_SINKS, DEFAULT_WINDOW, DEFAULT_CHUNK)
    else:
        given = {"bits": bits, "key_bits": key_bits, "value_bits": value_bits, **options}
        beside = [name for name, value in given.items() if value is not None]
        if beside:
            raise InputError(f"{beside[0]} was given beside a plan, which says that for each layer: change the plan.")
        settings = method_or_plan.settings_for(model)
        exact = method_or_plan.sinks, method_or_plan.window, method_or_plan.chunk
    attach()
    sinks, window, chunk = (
        exact[0] if sinks is None else sinks,
        exact[1] if window is None else window,
        exact[2] if chunk is None else chunk,
    )
    return [
        _compressed(facts, layer, sinks, window, chunk, calibration) if facts.compressible else own
        for facts, layer, own in zip(probe(model), settings, make_prompt_cache(model), strict=True)
    ]


def _compressed(
    facts: LayerFacts,
    layer: LayerSettings,
    sinks: int,
    window: int,
    chunk: Chunk,
    calibration: Calibrated | None,
) -> CompressedKVCache:
    sides: tuple[tuple[str, int, int, Role], ...] = (
        (layer.key_method, facts.key_dim, layer.key_bits, "keys"),
        (layer.value_method, facts.value_dim, layer.value_bits, "values"),
    )
    key_codec, value_codec = (
        layer_codec(find_method(method), facts.layer, dim, bits, role, layer.options, calibration)
        for method, dim, bits, role in sides
    )
    return CompressedKVCache(
        key_codec,
        value_codec,
        sinks=sinks,
        window=window,
        chunk=chunk,
        layer=facts.layer,
        path=facts.path,
        reason=facts.reason,
    )


def _exact_width(model: Module) -> Literal[16, 32]:
    """Bits of the dtype in which ``model`` makes its keys: that of its first float parameter."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    dtype = next(p.dtype for _, p in parameters if mx.issubdtype(p.dtype, mx.floating))
    return 32 if dtype == mx.float32 else 16
