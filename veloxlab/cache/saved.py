"""Serialisation of caches: settings, codecs and runs, with a SHA-256 checksum, in the files that mlx-lm writes.

mlx-lm saves the ``state`` of each cache: arrays as tensors, and strings as the codes of their characters. Our state
has arrays, and then one string: a JSON text that describes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache

from veloxlab.codecs import Codec, saving
from veloxlab.errors import InputError
from veloxlab.mlxlm import identity
from veloxlab.mlxlm.hooks import InPlace, loadable
from veloxlab.store import bytes_of, from_json, reading, to_json

FORMAT = "veloxlab cache 2"
Content = dict[str, Any]
_SAVED = "saved cache", None, "make it again from its text"  # what is read, and the way out


class Description(str):
    """A string that is made when its characters are read.

    mlx-lm reads ``state`` after each chunk of a prefill, to evaluate its arrays, and once to save it. It reads the
    characters only to save. A checksum of all held bytes at each chunk would take too long.
    """

    _content: Content
    _arrays: Sequence[mx.array]
    _settle: Callable[[], None]

    def __new__(cls, content: Content, arrays: Sequence[mx.array], settle: Callable[[], None]) -> Self:
        """``settle`` raises `InputError` if the tokens must not be saved."""
        self = super().__new__(cls)
        self._content, self._arrays, self._settle = content, arrays, settle
        return self

    def __iter__(self) -> Iterator[str]:
        self._settle()
        return iter(to_json(FORMAT, self._content, bytes_of(self._arrays)))


class Saved(InPlace, ABC):
    """The interface that mlx-lm needs to evaluate, save and read a cache."""

    @abstractmethod
    def describe(self) -> tuple[Content, list[mx.array]]:
        """JSON content and arrays, for `rebuild`. References that only other layers needed are dropped."""

    @abstractmethod
    def settle(self) -> None:
        """Raise `InputError` if the tokens must not be saved."""

    @classmethod
    @abstractmethod
    def rebuild(cls, content: Content, arrays: Iterator[mx.array]) -> Self:
        """Make a cache from the result of `describe`; takes the next of ``arrays``."""

    @property
    def state(self) -> list[Any]:
        """The arrays and a description: evaluated after each chunk of a prefill, and saved."""
        content, arrays = self.describe()
        return [*arrays, Description(content, arrays, self.settle)]

    @state.setter
    def state(self, saved: Sequence[Any]) -> None:
        self.__dict__ = type(self).from_state(saved).__dict__

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """Make a cache from a `state`; raises `InputError` if it is damaged, or of another version, method or model."""
        content, arrays = _opened(state)
        return cls.rebuild(content, iter(arrays))


class Checksummed:
    """A model's own cache that also saves its model, its layer and a checksum; see `add_checksum`.

    The state of mlx-vlm's caches has a second part, which mlx-lm does not save. The description has it.
    """

    native: ClassVar[Any]  # the class of the model's own cache
    model: str | None = None
    layer: int | None = None
    reason: str

    @property
    def state(self) -> list[Any]:
        """The cache's own state, and a description of it."""
        own = self.native.state.fget(self)
        leaves, arrays = _leaves(own)
        content = {"settings": {"model": self.model, "layer": self.layer, "reason": self.reason}, "leaves": leaves}
        if hasattr(self.native, "meta_state"):
            content["meta_state"] = self.native.meta_state.fget(self)
        return [own, Description(content, arrays, lambda: None)]

    @state.setter
    def state(self, saved: Sequence[Any]) -> None:
        leaves, arrays = _leaves(saved[0])
        content, _ = _opened([*arrays, saved[-1]])
        with reading(*_SAVED):
            if content["leaves"] != leaves:
                raise ValueError("its checksum does not match")
        settings = content["settings"]
        check_model(settings["model"], settings["layer"])
        self.native.state.fset(self, saved[0])
        if "meta_state" in content:
            self.native.meta_state.fset(self, content["meta_state"])
        self.__dict__ |= settings

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """As mlx-lm's; mlx-vlm's takes more arguments."""
        self = cls.__new__(cls)
        self.state = state
        return self


_KINDS = KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache  # of models; mlx-vlm has classes of these names
_NAMES = {"mlx_lm.models.cache": "Sealed", "mlx_vlm.models.cache": "SealedVlm"}  # in files
_checksummed: dict[type, type] = {}


def checksummed(kind: type) -> type | None:
    """The class that saves caches of ``kind`` with a checksum, or None. mlx-lm reads its files once it exists."""
    name = _NAMES.get(kind.__module__)
    if kind not in _checksummed and name is not None and kind.__name__ in [own.__name__ for own in _KINDS]:
        own = {"native": kind, "reason": f"the model's own {kind.__name__}"}
        _checksummed[kind] = loadable(type(name + kind.__name__, (Checksummed, kind), own))
    return _checksummed.get(kind)


for _kind in _KINDS:
    checksummed(_kind)


def add_checksum(cache: Any, model: str, layer: int, reason: str) -> None:  # noqa: ANN401 - any model's own
    """Make a model's own cache save its model, layer and checksum, if mlx-lm can read a cache of its kind."""
    kind = checksummed(type(cache))
    if kind is not None:
        cache.__class__ = kind
        cache.model, cache.layer = model, layer
    cache.reason = reason


def describe_codec(codec: Codec) -> tuple[Content, list[mx.array]]:
    """A codec as JSON and arrays."""
    plain, arrays = saving.to_parts(codec)
    method, version = saving.method_of(codec)
    said = {"class": f"{method}.{type(codec).__name__}", "version": version}
    return {**said, "fields": plain, "arrays": list(arrays)}, [*arrays.values()]


def restore_codec(said: Content, arrays: Iterator[mx.array]) -> Codec:
    """Make a codec from `describe_codec` and the next of ``arrays``; raises `InputError` for another version."""
    kind, own = saving.find_class(said["class"]), {name: next(arrays) for name in said["arrays"]}
    with reading(*_SAVED):
        saving.check_version(said["class"].partition(".")[0], said["version"])
        return saving.from_parts(kind, said["fields"], own)


def check_model(model: str, layer: int | None) -> None:
    """Raise `InputError` if this process made caches for other models and none for ``model``. Only layer 0 checks."""
    if not model or layer:
        return
    others = sorted({identity.name_of(other) for other in list(identity.models_here.values())})
    if others and model not in others:
        raise InputError(
            f"This cache was saved with the model {model}, and the model here is {', '.join(others)}: load that model, "
            "and read the cache with vl.load_cache(file, model)."
        )


def _opened(state: Sequence[Any]) -> tuple[Content, list[mx.array]]:
    """Content and evaluated arrays of a saved ``state``; raises `InputError` if the checksum differs."""
    with reading(*_SAVED):
        *arrays, said = state
        # a state that was not saved holds a `Description`, whose characters come from its iterator
        return from_json("".join(iter(said)), FORMAT, bytes_of(arrays)), arrays


def _leaves(state: object) -> tuple[dict[str, str], list[mx.array]]:
    """The kinds of all entries of a state, by name, and the entries that are not None as arrays."""
    leaves: list[tuple[str, Any]] = tree_flatten(state)  # type: ignore[assignment]
    return {name: type(leaf).__name__ for name, leaf in leaves}, [mx.array(x) for _, x in leaves if x is not None]
