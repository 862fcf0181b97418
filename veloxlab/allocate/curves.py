"""How a codec's distortion falls with its bits, measured for every KV head's keys and values on real activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab.allocate.sensitivity import mean_square
from veloxlab.cache.calibration import Calibration, layer_codec
from veloxlab.cache.plan import DEFAULT_SINKS
from veloxlab.checks import MAPPING, checked, many, whole
from veloxlab.codecs import TENSORS, find_method
from veloxlab.codecs.base import fitted_online
from veloxlab.errors import InputError
from veloxlab.measure.activations import capture_layers, first_tokens
from veloxlab.measure.errors import ratio
from veloxlab.mlxlm import probe
from veloxlab.progress import Progress, silent
from veloxlab.texts import excerpt

USUAL_BITS = range(1, 7)  # the paper's, and 1 bit for budgets near 2

CURVES = {
    "layer": pl.Int32,
    "head": pl.Int32,  # KV head
    "tensor": pl.String,  # "keys" or "values"
    "method": pl.String,
    "bits": pl.Int32,  # code bits per coordinate
    "head_dim": pl.Int32,
    "distortion": pl.Float64,  # E‖x − x̂‖² over the tokens behind the sinks
    "relative": pl.Float64,  # Σ‖x − x̂‖² / Σ‖x‖² over the same tokens
    "true_bits": pl.Float64,  # stored bits per coordinate: codes, scales, padding
    "bytes_per_token": pl.Float64,  # stored for one token of this head
}
"""Columns of `distortion_curves`."""


@checked(bits=many(whole()), calibrations=MAPPING)
def distortion_curves(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    methods: Sequence[str] = ("ratequant",),
    text: str | None = None,
    *,
    bits: Sequence[int] = USUAL_BITS,
    tokens: int = 1024,
    sinks: int = DEFAULT_SINKS,
    calibrations: Mapping[str, Calibration] | None = None,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Measure the distortion of every KV head's keys and values by method and width: `CURVES`.

    One layer's activations are held at a time.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    methods : ids; ``"ratequant"`` is TurboQuant, whose widths may differ from head to head.
    text : what the model reads, in one piece; the shipped WikiText-2 validation excerpt by default.
    bits : code widths to measure, those of them that a method has.
    tokens : how much of the text.
    sinks : first tokens that are not counted, as the cache keeps them exact.
    calibrations : what `veloxlab.calibrate` gave at these widths, by method, for methods that have to be fitted.
    progress : told of each layer.

    Raises
    ------
    InputError : unknown method, none of the widths are its own, a calibration is missing, or the text is too short.
    """
    found = [find_method(method) for method in dict.fromkeys(methods)]
    for method in found:
        if not set(bits) & set(method.bits):
            raise InputError(
                f"{method.id} has none of the widths {sorted(set(bits))}: choose among those of vl.methods()."
            )
    ids = first_tokens(tokenizer, excerpt("validation") if text is None else text, tokens)
    if len(ids) - sinks < 2:
        raise InputError(
            f"The text has {len(ids)} tokens, which leaves too few behind {sinks} sinks: give a longer text."
        )
    layers = sum(f.compressible for f in probe.probe(model))
    rows: list[tuple[object, ...]] = []
    for done, seen in enumerate(capture_layers(model, ids)):
        progress(done, layers, f"distortion of layer {seen.layer}")
        for tensor in TENSORS:
            x = seen.vectors(tensor)[:, :, sinks:]
            head_dim, norm = x.shape[-1], np.array(mean_square(x, 0), np.float64)
            for method in found:
                calibration = (calibrations or {}).get(method.id)
                for width in sorted(set(bits) & set(method.bits)):
                    codec = layer_codec(method, seen.layer, head_dim, width, tensor, {}, calibration)
                    codec = fitted_online(codec, x)
                    code = codec.encode(x, sinks)
                    distortion = np.array(mean_square(x - codec.decode(code).astype(mx.float32), 0), np.float64)
                    stored = code.nbytes / (x.shape[1] * x.shape[2])
                    rows += [
                        (seen.layer, head, tensor, method.id, width, head_dim, d, r, 8 * stored / head_dim, stored)
                        for head, (d, r) in enumerate(zip(distortion, ratio(distortion, norm), strict=True))
                    ]
    progress(layers, layers, "done")
    return pl.DataFrame(rows, schema=CURVES, orient="row")
