"""Runs another project's cache in that project's environment, for `measure.peers`: ``python in_peer.py FOLDER``.

It imports nothing of veloxlab. FOLDER has ``model/`` in mlx-lm's format and ``asked.json``: a peer's name, bits, and
token ids of each window. The program writes logits of each window ``[S, vocabulary]`` to ``logits_0.npy`` and so on,
those of the exact cache for the first tokens to ``exact.npy``, and ``found.json``: bytes that grow with the tokens of
a window, other bytes, and bytes of 16-bit keys and values; and whether the windows were read in one call or token by
token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import numpy.typing as npt
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from numpy.lib.array_utils import byte_bounds

FIRST = 24  # tokens of the test whether one call reads codes
BYTES_AT = 256, 768  # tokens; caches grow in steps of 256 or less
Cache = list[Any]
Logits = npt.NDArray[np.float32]


def _turboquant_mlx_full(model: Module, bits: int) -> Cache:
    made: Cache = import_module("turboquant_mlx.layers.polar_kv_cache").make_turboquant_cache(model, tq_bits=bits)
    return made


def _mlx_turboquant(model: Module, bits: int) -> Cache:
    made: Cache = import_module("mlx_turboquant").make_prompt_cache(model, kv_bits=bits)
    return made


def _mlx_vlm(model: Module, bits: int) -> Cache:
    """Return a cache that needs its own attention, which replaces mlx-lm's in the model's module."""
    attention = import_module("mlx_vlm.models.base").scaled_dot_product_attention
    vars(sys.modules[type(model).__module__])["scaled_dot_product_attention"] = attention
    make = import_module("mlx_vlm.turboquant").TurboQuantKVCache
    return [make(bits=bits) for _ in model.layers]


def _veloxquant_mlx(model: Module, bits: int) -> Cache:
    """Return a cache of the recommended method: two stages of ``bits`` each, for keys only."""
    velox = import_module("veloxquant_mlx")
    settings = velox.KVCacheConfig(method="turboquant_rvq", bit_width_inlier=bits)
    made: Cache = velox.KVCacheBuilder.for_model(model, settings)
    return made


CACHES: dict[str, Callable[[Module, int], Cache]] = {
    "turboquant-mlx-full": _turboquant_mlx_full,
    "mlx-turboquant": _mlx_turboquant,
    "mlx-vlm": _mlx_vlm,
    "veloxquant-mlx": _veloxquant_mlx,
}


def main(folder: Path) -> None:
    """Read every window through a new cache, and write the results."""
    asked = json.loads((folder / "asked.json").read_text())
    model, _ = mlx_lm.utils.load_model(folder / "model")
    stretches = asked["stretches"]
    first = stretches[0][:FIRST]
    exact = make_prompt_cache(model)
    native = read(model, first, exact, together=True)
    np.save(folder / "exact.npy", native)
    halves = sum(2 * array[..., : len(first), :].size for own in exact for array in (own.keys, own.values))

    def made() -> Cache:
        return CACHES[asked["peer"]](model, asked["bits"])

    at_once, alone = (read(model, first, made(), together) for together in (True, False))
    # a cache that gives exact tokens within a call differs from token by token by the whole loss of its codes
    together = bool(np.abs(at_once - alone).max() < 0.5 * np.abs(alone - native).max())
    for window, ids in enumerate(stretches):
        np.save(folder / f"logits_{window}.npy", read(model, ids, made(), together))
    last, sizes = stretches[-1], []
    for tokens in BYTES_AT:
        held = made()
        read(model, (last * tokens)[:tokens], held, together=True)
        sizes.append(live_bytes(held))
    of_token = (sizes[1] - sizes[0]) / (BYTES_AT[1] - BYTES_AT[0])
    found = {
        "mode": "oneshot" if together else "decode",
        "held_bytes": round(of_token * len(last)),
        "table_bytes": round(sizes[0] - of_token * BYTES_AT[0]),
        "fp16_bytes": halves // len(first) * len(last),
    }
    (folder / "found.json").write_text(json.dumps(found))


def read(model: Module, ids: list[int], cache: Cache | None, together: bool) -> Logits:
    """Return logits ``[S, vocabulary]``, float32, of tokens in one call, or in one call each."""
    calls = [ids] if together else [[token] for token in ids]
    return np.concatenate([np.array(model(mx.array([call]), cache=cache)[0].astype(mx.float32)) for call in calls])


def live_bytes(held: object) -> int:
    """Return the bytes of all arrays reachable from a cache; bytes shared by an array and its slices count once."""
    seen: dict[int, object] = {}
    places: list[tuple[int, int]] = []
    left = [held]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, str | bytes | int | float | type(None)):
            continue
        seen[id(one)] = one
        if isinstance(one, mx.array | np.ndarray):
            places.append(_place(one))
        elif isinstance(one, dict):
            left.extend(one.values())
        elif isinstance(one, list | tuple | set):
            left.extend(one)
        elif type(one).__module__.split(".")[0] not in ("builtins", "mlx", "numpy", "types", "functools"):
            left.extend(getattr(one, "__dict__", {}).values())
    total, end = 0, 0
    for first, behind in sorted(places):
        total += max(0, behind - max(first, end))
        end = max(end, behind)
    return total


def _place(array: mx.array | npt.NDArray[Any]) -> tuple[int, int]:
    """Return the first address of an array, and the address after its end."""
    if isinstance(array, mx.array):
        array = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    return byte_bounds(array) if array.size else (0, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
