"""The algorithms. Each is one file here and one line in `METHODS`."""

from __future__ import annotations

from ..errors import InputError
from . import none, turboquant
from .codec import Code, Codec
from .method import Method, Role

__all__ = ["METHODS", "Code", "Codec", "Method", "Role", "find_method"]

METHODS: dict[str, Method] = {
    method.id: method
    for method in (
        turboquant.METHOD,
        none.METHOD,
    )
}


def find_method(name: str) -> Method:
    """The method called ``name``; raises `InputError` that lists the known ones."""
    if name not in METHODS:
        raise InputError(f"Unknown method {name!r}. Known methods: {', '.join(METHODS)}.")
    return METHODS[name]
