"""The algorithms. Each is one file here and one line in `METHODS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veloxlab.codecs import commvq, none, polarquant, qjl, rabitq, ratequant, rvq, spectralquant, turboquant, vecinfer
from veloxlab.codecs.codec import Code, Codec
from veloxlab.codecs.method import Method, Role
from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

__all__ = ["METHODS", "Code", "Codec", "Method", "Role", "find_method", "methods"]

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
    if name not in METHODS:
        raise InputError(f"Unknown method {name!r}. Known methods: {', '.join(METHODS)}.")
    return METHODS[name]
