"""A cache of a million tokens on a device: ``python -m tests.million_tokens [FILE]`` takes 40 GB, and 20 GB of disk.

The model has all 32 layers of a model of 8 billion parameters, and random weights; keys and values are random too.
Rows are written to the file one by one: predicted and held bytes, bytes that MLX has allocated and
bytes of the device; the times of storing the first and last chunk of the prompt, of a token, a trim and a file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
from mlx_lm.models.llama import Model

from tests.on_gpu import commit
from veloxlab.cache.counts import CHUNK, calls
from veloxlab.measure.bench.shapes import random_model
from veloxlab.measure.bench.timing import facts
from veloxlab.measure.bench.turns import Decoding
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "million_h200.json"
TOKENS, LAYERS, BITS, SAVED = 1 << 20, 32, (4, 2), 2
TRIMS = 1, 4096
_FIRST, _TIMED = 40, 96  # decoded tokens

Row = dict[str, Any]


def device_bytes() -> int | None:
    """Return the used bytes of the device's memory, over all programs, by its driver."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(said.split()[0]) << 20


def taken() -> tuple[int, int]:
    """Return the bytes that MLX has allocated, and those of the device."""
    mx.clear_cache()
    mx.synchronize()
    return mx.get_active_memory(), device_bytes() or 0


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds, and the most bytes that MLX allocated meanwhile in addition."""
    mx.synchronize()
    mx.reset_peak_memory()
    before, start = mx.get_active_memory(), time.perf_counter()
    work()
    mx.synchronize()
    return time.perf_counter() - start, mx.get_peak_memory() - before


def filled(cache: list[Any], heads: int, dim: int, tokens: int) -> list[float]:
    """Store a text as mlx-lm reads it; return the seconds of each chunk, in all layers."""
    keys = mx.random.normal((1, heads, CHUNK, dim)).astype(mx.float16)
    values, spent = mx.random.normal(keys.shape).astype(mx.float16), []
    mx.eval(keys, values)
    for count in calls(tokens):
        mx.synchronize()
        start = time.perf_counter()
        for layer in cache:
            layer.update_and_fetch(keys[:, :, :count], values[:, :, :count])
            mx.eval(layer.state)
        mx.synchronize()
        spent.append(time.perf_counter() - start)
    return spent


def row(model: Model, bits: int, tokens: int, folder: Path | None, told: Callable[[Row], None]) -> None:
    """Measure all of one width; ``told`` gets the row after each part."""
    attention = model.layers[0].self_attn
    heads = attention.n_kv_heads
    dim = attention.k_proj.weight.shape[0] // heads
    allocated, on_device = taken()
    cache = vl.make_cache(model, "turboquant", bits=bits)
    plan = vl.measure.plan_memory(model, "turboquant", bits=bits, context=tokens)
    spent = filled(cache, heads, dim, tokens)
    ours = plan["cache"][0]
    found: Row = {
        "bits": bits,
        "tokens": tokens,
        "planned_bytes": int(plan.filter(cache=ours)["bytes"].sum()),
        "exact_bytes": int(plan.filter(cache="fp16")["bytes"].sum()),
        "held_bytes": sum(layer.nbytes for layer in cache),
    }
    now, device = taken()
    found |= {"allocated_bytes": now - allocated, "device_bytes": device - on_device}
    part = max(1, min(16, len(spent) // 4))
    found |= {
        "first_chunk_seconds": statistics.median(spent[1 : 1 + part]),
        "last_chunk_seconds": statistics.median(spent[-1 - part : -1]),
        "filled_seconds": sum(spent),
    }
    told(found)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    decoding = Decoding(model, cache, mx.array([[1]]))
    decoding.seconds(_FIRST)  # so that every kernel is compiled
    found["token_seconds"] = statistics.median(decoding.seconds(_TIMED))
    found["decode_peak_bytes"] = mx.get_peak_memory() - before
    told(found)
    for count in TRIMS:

        def trim(count: int = count) -> None:
            for layer in cache:
                layer.trim(count)
            mx.eval([layer.state for layer in cache])

        found[f"trim_{count}_seconds"], found[f"trim_{count}_peak_bytes"] = timed(trim)
    told(found)
    if folder is not None:
        path = folder / "cache.safetensors"
        found["save_seconds"], found["save_peak_bytes"] = timed(lambda: vl.save_cache(path, cache))
        found["file_bytes"] = path.stat().st_size
        told(found)
        held = sum(layer.nbytes for layer in cache)
        del cache
        mx.clear_cache()
        again: list[Any] = []
        found["load_seconds"], _ = timed(lambda: again.extend(vl.load_cache(path, model)))
        found["loaded_share"] = sum(layer.nbytes for layer in again) / held
        told(found)


def main(arguments: list[str]) -> None:
    """Measure all, and write the file after each part."""
    path = Path(arguments[0]) if arguments else FILE
    model = random_model("one layer of 7B", num_hidden_layers=LAYERS, vocab_size=4096)
    rows: dict[int, Row] = {}
    for bits in BITS:

        def told(found: Row, bits: int = bits) -> None:
            rows[bits] = dict(found)
            print(found, flush=True)
            result = {"facts": {**facts(), "commit": commit()}, "layers": LAYERS, "rows": list(rows.values())}
            write_atomically(path, json.dumps(result, indent=1).encode())

        with TemporaryDirectory() as folder:
            row(model, bits, TOKENS, Path(folder) if bits == SAVED else None, told)


if __name__ == "__main__":
    main(sys.argv[1:])
