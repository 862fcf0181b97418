"""The algorithms. Each is one file here and one line in `METHODS`."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from veloxlab.checks import FLAG, checked, instance
from veloxlab.codecs import commvq, none, polarquant, qjl, rabitq, ratequant, rvq, spectralquant, turboquant, vecinfer
from veloxlab.codecs.base import Code, Codec
from veloxlab.codecs.method import TENSORS, Method, Tensor
from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "METHODS",
    "TENSORS",
    "Code",
    "Codec",
    "Method",
    "Tensor",
    "find_method",
    "methods",
    "register",
    "registered",
    "unregister",
]

METHODS: dict[str, Method] = {
    method.id: method
    for method in (
        turboquant.METHOD,
        rvq.METHOD,
        vecinfer.METHOD,
        ratequant.METHOD,
        spectralquant.METHOD,
        rabitq.METHOD,
        qjl.METHOD,
        polarquant.METHOD,
        commvq.METHOD,
        none.METHOD,
    )
}


def methods() -> pl.DataFrame:
    """The algorithms: ``id, name, paper, calibrated, least_bits, most_bits, stored, options``."""
    import polars as pl  # codecs and kernels run without it, on a machine that only computes

    return pl.DataFrame(
        {
            "id": method.id,
            "name": method.name,
            "paper": method.paper,
            "calibrated": method.calibrated,
            "least_bits": method.bits.start,
            "most_bits": method.bits[-1],
            "stored": method.stored,
            "options": ", ".join(method.options),
        }
        for method in METHODS.values()
    )


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
    """Make an algorithm from elsewhere one of the methods: of caches, plans, measurements, charts and widgets.

    It lasts as long as the process, or until `unregister`. A cache that is saved with it is read again where a method
    of this id and version is registered, with classes of the same names and fields. Gives ``method`` back.

    Parameters
    ----------
    method : its id is lower case, such as ``"round_to_nearest"``; its ``codecs`` are frozen dataclasses.
    replace : whether a method of this id that was registered before makes room, as when a notebook's cell runs again.

    Raises
    ------
    InputError : the id is taken or is no name, the method names no classes or other things, or takes no bits.
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
    ours = f"{__name__}."
    _REGISTERED.update({kind: (name, method.version) for kind in kinds if not kind.__module__.startswith(ours)})
    return method


def registered(kind: type) -> tuple[str, int] | None:
    """Id and version under which ``kind``, a class from elsewhere, was last registered, even if undone since."""
    return _REGISTERED.get(kind)


@checked()
def unregister(name: str) -> None:
    """Undo `register`. Caches that were made with the method go on, and are saved under its id.

    Raises `InputError` if no such method was registered, or it is one of veloxlab's own.
    """
    if name in _OURS:
        raise InputError(f"The method {name!r} comes with veloxlab and stays.")
    del METHODS[find_method(name).id]
