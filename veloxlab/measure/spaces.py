"""The spaces in which methods see keys and values: as they are, before RoPE, spread, smoothed, on learned axes."""

from __future__ import annotations

from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from veloxlab.codecs.codec import Sample
from veloxlab.codecs.spectralquant import SpectralQuant
from veloxlab.codecs.transforms import SignedHadamard
from veloxlab.codecs.vecinfer import smoothing_factors
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture
from veloxlab.measure.errors import Side

Floats = NDArray[np.float32]
Space = Literal["raw", "before_rope", "rotated", "smoothed", "smoothed_rotated", "eigenbasis"]
SPACES: tuple[Space, ...] = get_args(Space)
SIDES: tuple[Side, ...] = get_args(Side)


def check_space(space: str) -> None:
    """Raise `InputError` unless ``space`` is one of `SPACES`."""
    if space not in SPACES:
        raise InputError(f"There is no space {space!r}: choose one of {', '.join(SPACES)}.")


def sides_of(space: Space) -> tuple[Side, ...]:
    """Which of keys and values there are in a space: RoPE turns keys alone."""
    check_space(space)
    return ("keys",) if space == "before_rope" else SIDES


def vectors(layer: LayerCapture, side: Side, space: Space = "raw") -> Floats:
    """Keys or values of a layer in one of the spaces ``[H, S, D]``, float32.

    ``raw``               As they go into the cache: keys after RoPE.
    ``before_rope``       Keys with their rotary embedding undone, as CommVQ codes them.
    ``rotated``           Random signs, then Hadamard: what TurboQuant, RVQ, RaBitQ and PolarQuant code.
    ``smoothed``          Each channel over λ = √(max |x|), VecInfer's first step; in units of λ.
    ``smoothed_rotated``  The same, then signs and Hadamard: what VecInfer codes of keys.
    ``eigenbasis``        SpectralQuant's axes, learned from these very vectors: of root-mean-square 1, the mean taken
                          off, the largest variance first.

    Raises
    ------
    InputError : an unknown space; values, or a layer without a known RoPE, before RoPE; too few tokens, or numbers that
        are not finite, for an eigenbasis.
    """
    check_space(space)
    x = (layer.keys if side == "keys" else layer.values).astype(mx.float32)
    if space == "before_rope":
        if side == "values":
            raise InputError("Values go through no RoPE: choose keys, or the space 'raw'.")
        if layer.rope is None:
            raise InputError(f"Layer {layer.layer} has no rotary embedding that is known: choose the space 'raw'.")
        x = layer.rope.inverse(x, 0)
    elif space == "eigenbasis":
        x = _on_axes(x, layer.layer)
    elif space in ("smoothed", "smoothed_rotated"):
        x = x / smoothing_factors(x)[:, None]
    if space in ("rotated", "smoothed_rotated"):
        x = SignedHadamard(x.shape[-1], seed=0).forward(x)
    return np.array(x[0])


def _on_axes(x: mx.array, layer: int) -> mx.array:
    if not mx.isfinite(x).all().item():
        raise InputError(f"Layer {layer} holds numbers that are NaN or infinite, which have no axes: see it in 'raw'.")
    heads = mx.array([head for head in range(x.shape[1]) if x[:, head].any().item()])  # one of zeros stays where it is
    if not heads.size:
        return x
    own = x[:, heads]
    fitted = SpectralQuant(x.shape[-1], bits=4).fit(Sample(own))  # axes and mean do not depend on the bits
    assert fitted.forward is not None
    assert fitted.mean is not None
    rms = mx.sqrt(mx.square(own).mean(axis=-1, keepdims=True))
    moved = mx.zeros_like(x)
    moved[:, heads] = own / mx.where(rms == 0, 1.0, rms) @ fitted.forward - fitted.mean
    return moved
