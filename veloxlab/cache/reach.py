"""The positions of a text whose keys a calibration fits, and the warning when a cache encodes later ones."""

from __future__ import annotations

import warnings

from veloxlab.codecs import METHODS, Codec, saving

_warned = set[tuple[str, str]]()  # methods and models


def others(method: str) -> str:
    """The ways to code long texts by a method that is not ``method``, in words."""
    return ", or ".join(each.long_texts for each in METHODS.values() if each.long_texts and each.id != method)


def warn_beyond(codec: Codec, reach: int, tokens: int, model: str) -> None:
    """Warn, once for each model and method, that keys are encoded up to ``tokens`` positions, and fit to ``reach``."""
    method = saving.method_of(codec)[0]
    if (method, model) in _warned:
        return
    name = METHODS[method].name if method in METHODS else method
    warnings.warn(
        f"{name} learned the keys of the first {reach:,} positions of a text, and this cache now encodes keys up to "
        f"position {tokens:,}, which lose more because RoPE rotates keys by position: for texts of N tokens calibrate "
        f"with {codec.reaches_by.format(N='N')}, or take {others(method)}.",
        stacklevel=2,
    )
    _warned.add((method, model))
