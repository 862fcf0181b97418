"""The dry run of a model: which of its caches can be compressed, and how their attention reads codes.

It runs one token, builds the graph and computes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from veloxlab.codecs.method import Role
from veloxlab.errors import InputError
from veloxlab.mlxlm import identity
from veloxlab.mlxlm.hooks import Handle, Mask, attach

Path = Literal["codes", "arrays"]
LATENT = "kv_lora_rank"  # what modules of latent attention (MLA) call the width of what they store


@dataclass
class LayerFacts:
    """What a dry run learned of one cache of a model.

    Attributes
    ----------
    layer : index in the prompt cache.
    slot : index in that entry, where it is a list of caches (state-space and attention in one layer); else None.
    native : class name of the model's own cache.
    compressible : whether it holds keys and values that a compressed cache can hold in its place.
    max_size, keep : tokens that a sliding layer sees, and how many first ones it never forgets; None and 0 elsewhere.
    kv_heads, key_dim, value_dim : of its keys and values; 0 where there are none.
    lends : whether other layers read this one's keys and values from its cache.
    path : how attention reads a compressed cache there.
    reason : why, in words.
    """

    layer: int
    native: str
    compressible: bool
    slot: int | None = None
    max_size: int | None = None
    keep: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    lends: bool = False
    path: Path = "codes"
    reason: str = "attention reads the codes"

    @property
    def dims(self) -> dict[Role, int]:
        """Head dimensions of keys and of values."""
        return {"keys": self.key_dim, "values": self.value_dim}


class Probe(Handle):
    """Stands in for a cache and for the handle it gives: notes what passes and answers with zeros.

    Parameters
    ----------
    facts : of the cache; the shapes that pass are noted there.
    offset : how many tokens the model is told that it holds.

    Attributes
    ----------
    keys : what it was given.
    """

    def __init__(self, facts: LayerFacts, offset: int = 0) -> None:
        self.facts = facts
        self.offset = offset
        self.fetched = self.attended = False
        if facts.path == "codes":
            self.bits, self.group_size = 0, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Note the shapes of what a layer stores."""
        self.facts.kv_heads, self.facts.key_dim, self.facts.value_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
        self.fetched, self.keys, self._values = True, keys, values
        self.offset += keys.shape[2]
        return self._handed()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What was fetched, for a layer that shares it."""
        self.facts.lends = True
        return self._handed()

    def _handed(self) -> tuple[Any, Any]:
        return (self, self) if self.facts.path == "codes" else (self.keys, self._values)

    def attend(self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None) -> mx.array:
        """Zeros, whatever is asked."""
        self.attended = True
        return mx.zeros((*q.shape[:-1], self.facts.value_dim), q.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> None:
        """No mask: a single token sees all that there is."""


_known: dict[int, tuple[str, list[LayerFacts]]] = {}  # structure and facts, by id: a module cannot be hashed


def probe(model: Module) -> list[LayerFacts]:
    """Facts of every cache of the model, from a dry run of one token that computes nothing.

    It is done once for each structure of a model: adapters, or layers that were taken out, need another.

    Raises
    ------
    InputError : if the model fails with its own caches.
    """
    now = identity.structure(model)
    if id(model) not in _known:
        weakref.finalize(model, _known.pop, id(model), None)
    if _known.get(id(model), ("", []))[0] != now:
        _known[id(model)] = now, dry_run(model)
        identity.models_here[id(model)] = model
    return _known[id(model)][1]


def dry_run(model: Module) -> list[LayerFacts]:
    """What `probe` gives, without a look at the weights: they may be such as were never made.

    Raises
    ------
    InputError : if the model fails with its own caches.
    """
    attach()
    facts = _first_facts(own_cache(model))
    _dry_run(model, facts)
    _leave_latents(model, facts)
    _leave_all_but_one(facts)
    return facts


def weightless(config: Mapping[str, Any]) -> Module:
    """A model of mlx-lm's own class for a ``config.json``, whose weights are never made as long as none is read.

    It computes in float32 where the configuration says so, and else in 16 bits.

    Raises
    ------
    InputError : mlx-lm has no such model, or the configuration is not a model's.
    """
    try:
        from mlx_lm.utils import _get_classes  # private: an mlx-lm without it does all but this

        kind, arguments = _get_classes(dict(config))
        model: Module = kind(arguments.from_dict(dict(config)))
    except Exception as error:  # every model reads its configuration in its own way
        raise InputError(
            f"mlx-lm makes no model of this configuration (model_type {config.get('model_type')!r}: "
            f"{type(error).__name__}: {error}): give a model's config.json, or type the shape in."
        ) from error
    named = config.get("dtype") or config.get("torch_dtype")
    model.set_dtype(mx.float32 if named == "float32" else mx.bfloat16)
    return model


def state_bytes(model: Module) -> int:
    """Bytes of the states of one sequence that do not grow with it (state-space, convolution), from shapes alone."""
    return sum(slot.nbytes for slot in slots_of(after_one_token(model)) if isinstance(slot, ArraysCache))


def after_one_token(model: Module) -> list[Any]:
    """The model's own caches as one token leaves them, whose numbers are not computed: for shapes and dtypes."""
    caches = own_cache(model)
    model(mx.array([[0]]), cache=caches)
    return caches


def slots_of(caches: Sequence[Any]) -> list[Any]:
    """The single caches of a prompt cache, of which some layers have several."""
    return [slot for entry in caches for slot in getattr(entry, "caches", (entry,))]


def slot_of(caches: Sequence[Any], facts: LayerFacts) -> Any:  # noqa: ANN401 - mlx-lm's caches share no base
    """The single cache of a prompt cache that ``facts`` are of."""
    entry = caches[facts.layer]
    return entry if facts.slot is None else entry.caches[facts.slot]


def own_cache(model: Module) -> list[Any]:
    """The caches that mlx-lm makes for the model when veloxlab is not asked: `use` may have changed what it makes."""
    make = getattr(type(model), "make_cache", None)
    return list(make(model)) if make else [KVCache() for _ in model.layers]


def with_caches(
    model: Module, make: Callable[[LayerFacts], Any], facts: Sequence[LayerFacts] | None = None
) -> list[Any]:
    """The model's own caches, with what ``make`` gives in the place of each that a compressed one can take."""
    caches = own_cache(model)
    for found in probe(model) if facts is None else facts:
        if not found.compressible:
            continue
        if found.slot is None:
            caches[found.layer] = make(found)
        else:
            slots = list(caches[found.layer].caches)
            slots[found.slot] = make(found)
            caches[found.layer] = CacheList(*slots)
    return caches


def _first_facts(caches: Sequence[Any]) -> list[LayerFacts]:
    """Facts before anything was run."""
    facts = []
    for layer, entry in enumerate(caches):
        slots = list(enumerate(entry.caches)) if isinstance(entry, CacheList) else [(None, entry)]
        for slot, own in slots:
            name = type(own).__name__
            found = LayerFacts(layer, name, type(own) in (KVCache, RotatingKVCache), slot)
            if not found.compressible:
                found.reason = f"the model's own {name} is kept"
            elif type(own) is RotatingKVCache:
                found.max_size, found.keep = own.max_size, own.keep
                found.reason = f"attention reads the codes of the {own.max_size} tokens it sees"
            facts.append(found)
    return facts


def _dry_run(model: Module, facts: list[LayerFacts]) -> None:
    """Run one token until no layer fails, moving a layer that does from codes to arrays, and then to its own cache."""
    while True:
        probes: list[Probe] = []

        def probed(found: LayerFacts, probes: list[Probe] = probes) -> Probe:
            probes.append(Probe(found))
            return probes[-1]

        caches = with_caches(model, probed, facts)
        try:
            model(mx.array([[0]]), cache=caches)
        except Exception as error:  # a model may fail on a handle in any way: that is the question
            culprit = next((p for p in reversed(probes) if p.fetched and p.facts.path == "codes"), None)
            if culprit is not None:
                culprit.facts.path = "arrays"
                culprit.facts.reason = f"its own arithmetic needs arrays ({type(error).__name__} on anything else)"
            elif probes:
                for p in probes:
                    p.facts.compressible = False
                    p.facts.reason = f"it needs the model's own {p.facts.native} ({type(error).__name__} on any other)"
            else:
                raise InputError(
                    f"This model ({type(model).__module__}) does not run on one token with its own caches: {error}"
                ) from error
            continue
        silent = [p for p in probes if p.fetched and p.facts.path == "codes" and not p.attended]
        if not silent:
            break
        for p in silent:
            p.facts.path, p.facts.reason = "arrays", "its attention does not go through mlx-lm's own function"
    for p in probes:
        if not p.fetched:
            p.facts.compressible, p.facts.reason = False, "the layer stores no keys and values of its own"


def _leave_latents(model: Module, facts: Sequence[LayerFacts]) -> None:
    """Keep the own caches of layers that store latents: the model compresses there itself."""
    widths = {getattr(module, LATENT) for _, module in model.named_modules() if hasattr(module, LATENT)}
    for found in facts:
        if found.compressible and found.kv_heads == 1 and widths & {found.key_dim, found.value_dim}:
            found.compressible = False
            found.reason = f"it stores latents (MLA), so the model's own {found.native} is kept"


def _leave_all_but_one(facts: Sequence[LayerFacts]) -> None:
    """Compress one cache of each layer: plans, calibrations and measurements have one key codec and one value codec."""
    taken: set[int] = set()
    for found in facts:
        if found.compressible and found.layer in taken:
            found.compressible = False
            found.reason = f"another cache of the layer is compressed, so the model's own {found.native} is kept"
        elif found.compressible:
            taken.add(found.layer)


def exact_width(model: Module) -> Literal[16, 32]:
    """Bits of the dtype in which ``model`` makes its keys: that of its first float parameter."""
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    dtype = next(p.dtype for _, p in parameters if mx.issubdtype(p.dtype, mx.floating))
    return 32 if dtype == mx.float32 else 16
