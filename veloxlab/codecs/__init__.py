"""The algorithms: each is one file here, listed in the order of `_FILES`."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from veloxlab.checks import FLAG, checked, instance
from veloxlab.codecs import (
    commvq,
    fisherquant,
    none,
    polarquant,
    qjl,
    rabitq,
    ratequant,
    rvq,
    spectralquant,
    turboquant,
    vecinfer,
)
from veloxlab.codecs.base import Code, Codec
from veloxlab.codecs.method import TENSORS, Method, Tensor
from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["METHODS", "TENSORS", "Code", "Codec", "Method", "Tensor"]
__all__ += ["find_method", "methods", "register", "registered", "unregister"]

_FILES = turboquant, rvq, vecinfer, ratequant, spectralquant, rabitq, qjl, polarquant, commvq, fisherquant, none
METHODS: dict[str, Method] = {file.METHOD.id: file.METHOD for file in _FILES}


def methods() -> pl.DataFrame:
    """The algorithms: ``id, name, paper, calibrated, least_bits, most_bits, stored, options``."""
    import polars as pl  # codecs and kernels run without it, on a machine that only computes

    rows = [
        (m.id, m.name, m.paper, m.calibrated, m.bits.start, m.bits[-1], m.stored, ", ".join(m.options))
        for m in METHODS.values()
    ]
    names = ["id", "name", "paper", "calibrated", "least_bits", "most_bits", "stored", "options"]
    return pl.DataFrame(rows, names, orient="row")


def find_method(name: str) -> Method:
    """The method called ``name``; raises `InputError` that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"Unknown method {name!r}. Known methods: {', '.join(METHODS)}.")
    return METHODS[name]


_OURS = frozenset(METHODS)
_ID = re.compile(r"[a-z][a-z0-9_]*")
# ids and versions of methods by codec class: codecs outlive `unregister`
_REGISTERED: WeakKeyDictionary[type, tuple[str, int]] = WeakKeyDictionary()


@checked(method=instance(Method, "a veloxlab.codecs.Method"), replace=FLAG)
def register(method: Method, *, replace: bool = False) -> Method:
    """Add an algorithm to the methods of this process, until `unregister`, and return it.

    To read a saved cache of it, register a method of the same id and version, with classes of the same names and
    fields. Raises `InputError`: the id is taken or not a name; ``codecs`` is empty or has other things than frozen
    dataclasses; there are no bits.

    Parameters
    ----------
    method : its id is lower case, such as ``"round_to_nearest"``; its ``codecs`` are frozen dataclasses.
    replace : whether to replace a registered method of this id, for example when a notebook's cell runs again.
    """
    name, kinds = method.id, method.codecs
    for wrong, sentence in (
        (not _ID.fullmatch(name), f"{name!r} is no id of a method: take small letters, digits and _, a letter first."),
        (name in _OURS, f"The method {name!r} comes with veloxlab and stays as it is: choose another id."),
        (
            name in METHODS and not replace,
            f"A method {name!r} is registered already: vl.codecs.unregister({name!r}) first, or replace=True.",
        ),
        (not kinds, f"The method {name!r} names no classes: give Method(codecs=(...)) those that its build makes."),
        (not len(method.bits), f"The method {name!r} takes no bits: give a range, such as range(2, 9)."),
    ):
        if wrong:
            raise InputError(sentence)
    for kind in kinds:
        if not (isinstance(kind, type) and is_dataclass(kind) and kind.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise InputError(f"{kind!r} is no frozen dataclass, as a codec has to be: write @dataclass(frozen=True).")
    METHODS[name] = method
    others = (kind for kind in kinds if not kind.__module__.startswith(f"{__name__}."))
    _REGISTERED.update(dict.fromkeys(others, (name, method.version)))
    return method


@checked(kind=instance(type, "the class of a codec"))
def registered(kind: type) -> tuple[str, int] | None:
    """Id and version with which ``kind``, a class from elsewhere, was last registered, even if unregistered since."""
    return _REGISTERED.get(kind)


@checked()
def unregister(name: str) -> None:
    """Undo `register`; caches made with the method still work. Raises `InputError` for one of veloxlab's own."""
    if name in _OURS:
        raise InputError(f"The method {name!r} comes with veloxlab and stays.")
    del METHODS[find_method(name).id]
