"""How caches are saved: settings, codecs and runs, with a SHA-256 checksum, in the files that mlx-lm writes.

mlx-lm saves the ``state`` of each cache: arrays as tensors, and words as the numbers of their characters. Ours begins
with arrays, and ends with one word, a JSON text that says what they are.
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
    """A text that is written when its characters are asked for.

    mlx-lm reads ``state`` after each chunk of a prefill, to evaluate its arrays, and once to save it. Only then does it
    look at the characters: hashing all that is held would be too much to do each time.
    """

    _content: Content
    _arrays: Sequence[mx.array]
    _settle: Callable[[], None]

    def __new__(cls, content: Content, arrays: Sequence[mx.array], settle: Callable[[], None]) -> Self:
        """``settle`` raises `InputError` if what is held must not be saved."""
        self = super().__new__(cls)
        self._content, self._arrays, self._settle = content, arrays, settle
        return self

    def __iter__(self) -> Iterator[str]:
        self._settle()
        return iter(to_json(FORMAT, self._content, bytes_of(self._arrays)))


class Saved(InPlace, ABC):
    """What mlx-lm needs of a cache to evaluate it, to save it and to read it again."""

    @abstractmethod
    def describe(self) -> tuple[Content, list[mx.array]]:
        """What `rebuild` needs: what JSON can hold, and arrays. What was only for layers that attended is let go."""

    @abstractmethod
    def settle(self) -> None:
        """Raise `InputError` if what is held must not be saved."""

    @classmethod
    @abstractmethod
    def rebuild(cls, content: Content, arrays: Iterator[mx.array]) -> Self:
        """Undo `describe`, with the next of ``arrays``."""

    @property
    def state(self) -> list[Any]:
        """What is evaluated after each chunk of a prefill, and what is saved: the arrays, and a description."""
        content, arrays = self.describe()
        return [*arrays, Description(content, arrays, self.settle)]

    @state.setter
    def state(self, saved: Sequence[Any]) -> None:
        self.__dict__ = type(self).from_state(saved).__dict__

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """Undo `state`; raises `InputError` if it was altered, or is of another version, method or model than here."""
        content, arrays = _opened(state)
        return cls.rebuild(content, iter(arrays))


class Checksummed:
    """What `add_checksum` adds to a model's own cache: it saves its model and layer, and a checksum.

    mlx-vlm's caches have a second part of their state, which mlx-lm does not save: it is in the description.
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
                raise ValueError("it is not what was written")
        settings = content["settings"]
        check_model(settings["model"], settings["layer"])
        self.native.state.fset(self, saved[0])
        if "meta_state" in content:
            self.native.meta_state.fset(self, content["meta_state"])
        self.__dict__ |= settings

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """As mlx-lm's, where mlx-vlm's takes more."""
        self = cls.__new__(cls)
        self.state = state
        return self


_KINDS = KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache  # that models make; mlx-vlm has its own of these names
_NAMES = {"mlx_lm.models.cache": "Sealed", "mlx_vlm.models.cache": "SealedVlm"}  # by module, as they stand in files
_checksummed: dict[type, type] = {}


def checksummed(kind: type) -> type | None:
    """The class that saves caches of ``kind`` with a checksum, or None; a file of them is read once it was made."""
    name = _NAMES.get(kind.__module__)
    if kind not in _checksummed and name is not None and kind.__name__ in [own.__name__ for own in _KINDS]:
        own = {"native": kind, "reason": f"the model's own {kind.__name__}"}
        _checksummed[kind] = loadable(type(name + kind.__name__, (Checksummed, kind), own))
    return _checksummed.get(kind)


for _kind in _KINDS:
    checksummed(_kind)


def add_checksum(cache: Any, model: str, layer: int, reason: str) -> None:  # noqa: ANN401 - any model's own
    """Let a model's own cache save what it is of, with a checksum, where it is of a kind that mlx-lm reads."""
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
    """Undo `describe_codec`, with the next of ``arrays``; raises `InputError` for a codec of another version."""
    kind, own = saving.find_class(said["class"]), {name: next(arrays) for name in said["arrays"]}
    with reading(*_SAVED):
        saving.check_version(said["class"].partition(".")[0], said["version"])
        return saving.from_parts(kind, said["fields"], own)


def check_model(model: str, layer: int | None) -> None:
    """Raise `InputError` if caches were made here for other models, and none for ``model``; asks at layer 0 alone."""
    if not model or layer:
        return
    others = sorted({identity.name_of(other) for other in list(identity.models_here.values())})
    if others and model not in others:
        raise InputError(
            f"This cache was saved with the model {model}, and the model here is {', '.join(others)}: load that model, "
            "and read the cache with vl.load_cache(file, model)."
        )


def _opened(state: Sequence[Any]) -> tuple[Content, list[mx.array]]:
    """Content and arrays of a saved ``state``, evaluated; raises `InputError` unless they are what was written."""
    with reading(*_SAVED):
        *arrays, said = state
        # a state that was not saved holds a `Description`, whose characters come from its iterator
        return from_json("".join(iter(said)), FORMAT, bytes_of(arrays)), arrays


def _leaves(state: object) -> tuple[dict[str, str], list[mx.array]]:
    """Kinds of all that a state holds, by name, and as arrays all but None."""
    leaves: list[tuple[str, Any]] = tree_flatten(state)  # type: ignore[assignment]
    return {name: type(leaf).__name__ for name, leaf in leaves}, [mx.array(x) for _, x in leaves if x is not None]
