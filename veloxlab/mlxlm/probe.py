"""Dry run of one token that finds a model's caches: which can be compressed, and how their attention reads codes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, ClassVar, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from veloxlab.codecs.method import Tensor
from veloxlab.errors import InputError
from veloxlab.mlxlm import (
    identity,
    own_attention,  # noqa: F401 - registers what `attach` replaces
)
from veloxlab.mlxlm.hooks import Handle, InPlace, Mask, attach, shape_in_common

Path = Literal["codes", "latents", "arrays"]
LATENT = "kv_lora_rank"  # attribute of latent attention (MLA): width of the latent that is stored as keys
REPLACED = ("KVCache", "RotatingKVCache", "ChunkedKVCache")  # classes of mlx-lm, and of mlx-vlm with these names


@dataclass
class LayerFacts:
    """Result of a dry run for one cache of a model."""

    layer: int  # its number in plans, calibrations and measurements: index in the prompt cache, except if entries
    # have several compressible caches, which count one by one, such as LongCat's two latents of a block
    native: str  # class name of the model's own cache
    compressible: bool  # whether a compressed cache can hold its keys and values
    slot: int | None = None  # index in its entry of the prompt cache, if that is a list (state-space and attention)
    max_size: int | None = None  # tokens that a sliding layer sees
    keep: int = 0  # first tokens that a sliding layer always keeps
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    exact_bits: int = 16  # of a value in the model's own cache
    lends: bool = False  # whether other layers read this layer's keys and values from its cache
    path: Path = "codes"  # how attention reads a compressed cache there; see `Probe`
    reason: str = "attention reads the codes"  # reason for the path, or for the model's own cache
    entry: int = 0  # index in the prompt cache

    @property
    def dims(self) -> dict[Tensor, int]:
        """Head dimensions of keys and of values."""
        return {"keys": self.key_dim, "values": self.value_dim}

    @property
    def values_per_token(self) -> int:
        """Numbers in the keys and values of a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def exact_bytes(self) -> int:
        """Bytes of one exact token."""
        return self.values_per_token * self.exact_bits // 8

    def leave(self, reason: str) -> None:
        """Keep the model's own cache."""
        self.compressible, self.reason = False, reason


class Probe(InPlace, Handle):
    """Takes the place of a cache of ``offset`` tokens and of its handle: records calls, and answers with zeros.

    On the path ``"latents"`` a latent is stored as keys, and the rotary part of the keys as values. A single token
    attends to the handle of the latent; several tokens attend to the arrays that the model computes from it. A probe
    has no ``keys`` and ``values``, like a compressed cache, so that a layer that reads these attributes fails in the
    dry run.
    """

    _order: ClassVar = count()

    def __init__(self, facts: LayerFacts, offset: int = 0) -> None:
        self.facts, self.offset = facts, offset
        self.fetched = self.attended = False
        self.asked = 0  # order number, over all probes, of the last request for its keys and values
        if facts.path == "codes":
            self.bits, self.group_size = 0, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Record the shapes that a layer stores."""
        self.facts.kv_heads, self.facts.key_dim, self.facts.value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
        self.fetched, self.stored_keys, self.stored_values = True, keys, values
        self.offset += keys.shape[2]
        return self._handed()

    def keys_and_values(self) -> tuple[Any, Any]:
        """The last result of `update_and_fetch`, for a layer that shares it."""
        self.facts.lends = True
        return self._handed()

    def _handed(self) -> tuple[Any, Any]:
        self.asked = next(self._order)
        if self.facts.path == "latents" and self.stored_keys.shape[2] == 1:
            return self, self.stored_values
        return (self, self) if self.facts.path == "codes" else (self.stored_keys, self.stored_values)

    @property
    def mixed(self) -> mx.array:
        """The array that attention mixes."""
        return self.stored_keys if self.facts.path == "latents" else self.stored_values

    @property
    def dtype(self) -> mx.Dtype:
        """See `Handle.dtype`."""
        return self.stored_keys.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Handle.shape`."""
        return shape_in_common(self.stored_keys.shape[:3], self.stored_keys.shape[-1], self.stored_values.shape[-1])

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """Return zeros."""
        self.attended = True
        return mx.zeros((*q.shape[:-1], self.mixed.shape[-1]), q.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return None: a single token sees all tokens."""
        return None

    @property
    def start_position(self) -> int:
        """Position of the oldest token, as in ``ChunkedKVCache``: all held tokens are new."""
        return self.offset

    def maybe_trim_front(self) -> None:
        """Do nothing: see `start_position`."""


_known: dict[int, tuple[str, list[LayerFacts]]] = {}  # structure and facts, by id: a module cannot be hashed


def probe(model: Module) -> list[LayerFacts]:
    """Return the facts of every cache of the model, from a dry run of one token that computes nothing.

    The run is repeated only if the structure of the model changes, by adapters or removed layers. Raises
    `InputError` if the model fails with its own caches.
    """
    now = identity.structure(model)
    if id(model) not in _known:
        weakref.finalize(model, _known.pop, id(model), None)
    if _known.get(id(model), ("", []))[0] != now:
        _known[id(model)] = now, dry_run(model)
        identity.models_here[id(model)] = model
    return _known[id(model)][1]


def dry_run(model: Module) -> list[LayerFacts]:
    """Do the dry run of `probe` without reading weights, which may be not computed; same result and errors."""
    attach()
    facts = _first_facts(own_cache(model))
    with identity.unchanged(model):
        while not _passes(model, facts):
            pass
    width = exact_width(model)
    for found in (f for f in facts if f.compressible):
        found.exact_bits = width
    _number(facts)
    return facts


def _number(facts: Sequence[LayerFacts]) -> None:
    """Set each ``layer``, different for all compressible caches."""
    first = 0
    for _, entry in groupby(facts, key=lambda found: found.entry):
        coded = 0
        for found in entry:
            found.layer = first + (coded if found.compressible else 0)
            coded += found.compressible
        first += max(1, coded)


def after_one_token(model: Module) -> list[Any]:
    """Return the model's own caches after one token that is not computed, for shapes and dtypes."""
    caches = own_cache(model)
    with identity.unchanged(model):
        model(mx.array([[0]]), cache=caches)
    return caches


def slots_of(caches: Sequence[Any]) -> list[Any]:
    """Return the single caches of a prompt cache, in which some layers have several."""
    return [slot for entry in caches for slot in getattr(entry, "caches", (entry,))]


def slot_of(caches: Sequence[Any], facts: LayerFacts) -> Any:  # noqa: ANN401 - mlx-lm's caches share no base
    """Return the single cache of a prompt cache that ``facts`` describe."""
    entry = caches[facts.entry]
    return entry if facts.slot is None else entry.caches[facts.slot]


def own_cache(model: Module) -> list[Any]:
    """Return the caches that mlx-lm makes for the model without veloxlab, for instance in its server."""
    make = getattr(type(model), "make_cache", None)
    return list(make(model)) if make else [KVCache() for _ in model.layers]


def with_caches(
    model: Module, make: Callable[[LayerFacts], Any], facts: Sequence[LayerFacts] | None = None
) -> list[Any]:
    """Return the model's own caches, each compressible one replaced by the result of ``make``, unless that is None."""
    caches = own_cache(model)
    for found in probe(model) if facts is None else facts:
        made = make(found) if found.compressible else None
        if made is None:
            continue
        if found.slot is None:
            caches[found.entry] = made
        else:
            slots = list(caches[found.entry].caches)
            slots[found.slot] = made
            caches[found.entry] = type(caches[found.entry])(*slots)
    return caches


def probes_of(caches: Sequence[Any]) -> list[Probe]:
    """Return the probes among the single caches of a prompt cache."""
    return [slot for slot in slots_of(caches) if isinstance(slot, Probe)]


def _first_facts(caches: Sequence[Any]) -> list[LayerFacts]:
    facts = []
    for index, entry in enumerate(caches):
        slots = list(enumerate(entry.caches)) if type(entry).__name__ == "CacheList" else [(None, entry)]
        for slot, own in slots:
            name = type(own).__name__
            known = type(own).__module__ in ("mlx_lm.models.cache", "mlx_vlm.models.cache") and name in REPLACED
            found = LayerFacts(index, name, known, slot, entry=index)
            if not known:
                found.leave(f"the model's own {name} is kept")
            elif name == "RotatingKVCache":
                found.max_size, found.keep = own.max_size, own.keep
                found.reason = f"attention reads the codes of the {own.max_size} tokens it sees"
            elif name == "ChunkedKVCache":
                found.max_size = own.chunk_size + 1  # including the query itself
                found.reason = f"attention reads the codes of the {own.chunk_size} tokens before it"
            facts.append(found)
    return facts


def _passes(model: Module, facts: Sequence[LayerFacts]) -> bool:
    """Run one token. If a layer fails, change its facts from codes to arrays to its own cache, and return False.

    A layer that stores a latent is tried on the path ``"latents"`` between codes and arrays.
    """
    caches = with_caches(model, Probe, facts)
    probes = probes_of(caches)
    try:
        model(mx.array([[0]]), cache=caches)
    except Exception as error:  # a model may fail on a handle with any exception
        kind, fetched = type(error).__name__, [p for p in probes if p.fetched]
        if keys_alone := [p for p in fetched if p.stored_values is p.stored_keys or not p.stored_values.shape[-1]]:
            for p in keys_alone:
                p.facts.leave(
                    f"it stores keys without values, for an indexer: the model's own {p.facts.native} is kept"
                )
            return False
        if not probes:
            name = type(model).__module__
            part = ". Give its language_model" if hasattr(model, "language_model") else ""
            said = f"This model ({name}) does not run on one token with its own caches: {error}{part}"
            raise InputError(said) from error
        last = max(fetched, key=lambda p: p.asked).facts if fetched else None  # the cache at which it failed
        if last is not None and last.path == "codes" and last.kv_heads == 1 and last.key_dim in _latents(model):
            last.path, last.reason = "latents", "attention reads the codes of the latent (MLA)"
        elif last is not None and last.path != "arrays":
            last.path, last.reason = "arrays", f"its own arithmetic needs arrays ({kind} on anything else)"
        else:
            for found in [p.facts for p in probes] if last is None else [last]:
                found.leave(f"it needs the model's own {found.native} ({kind} on any other)")
        return False
    silent = [p.facts for p in probes if p.fetched and p.facts.path != "arrays" and not p.attended]
    for found in silent:
        found.path, found.reason = "arrays", "its attention does not go through mlx-lm's own function"
    for p in probes:
        if not (silent or p.fetched):
            p.facts.leave("the layer stores no keys and values of its own")
    return not silent


def _latents(model: Module) -> set[int]:
    return {getattr(module, LATENT) for _, module in model.named_modules() if hasattr(module, LATENT)}


def exact_width(model: Module) -> Literal[16, 32]:
    """Return the bits of the dtype of ``model``'s keys, which is that of its first float parameter."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    dtype = next(p.dtype for _, p in parameters if mx.issubdtype(p.dtype, mx.floating))
    return 32 if dtype == mx.float32 else 16
