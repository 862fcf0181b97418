"""Seconds until the kernels of a method are built, checked and in use, on a GPU that has built none before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

import mlx.core as mx

from veloxlab.cache.counts import BLOCK, CHUNK
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs import TENSORS, Codec
from veloxlab.kernels.backend import built_kernels
from veloxlab.kernels.compiled import FUNCTION, folder
from veloxlab.measure.bench.shapes import SHAPES
from veloxlab.measure.bench.timing import ENCODED, Row, Tell, fitted, vectors

_TOGETHER = 6  # processes; a compiler has one thread
_STEPS = 4 * BLOCK  # decoded tokens: until blocks have left the window
_CHILD = "import sys; import veloxlab; from veloxlab.measure.bench.builds import session; print(*session(sys.argv[1]))"


def builds(methods: Sequence[str] = ENCODED, progress: Tell = print) -> list[Row]:
    """Time the kernels that a session of each method builds: it reads a prompt, and decodes until blocks have left.

    Each method has a process, which finds no compiled kernels on the disk but MLX's own. Rows: ``cache, kernels,
    seconds`` (by which the first session takes longer than the second).
    """

    def row(method: str) -> Row:
        with TemporaryDirectory() as own:
            if folder().exists():
                shutil.copytree(folder(), own, dirs_exist_ok=True, ignore=shutil.ignore_patterns(f"{FUNCTION}*"))
            env = os.environ | {"MLX_PTX_CACHE_DIR": own}
            command = [sys.executable, "-c", _CHILD, method]
            told = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        kernels, seconds = told.stdout.split()[-2:]
        progress(f"{method}: {kernels} kernels are built in {float(seconds):.1f} s")
        return {"cache": method, "kernels": int(kernels), "seconds": float(seconds)}

    with ThreadPoolExecutor(_TOGETHER) as pool:
        return list(pool.map(row, methods))


def session(method: str) -> tuple[int, float]:
    """Return the number of kernels that a session of a method builds, and by how many seconds that delays it."""
    codecs = [fitted(method, SHAPES[0], tensor) for tensor in TENSORS]
    before = built_kernels()
    first, second = _seconds(codecs), _seconds(codecs)
    return built_kernels() - before, first - second


def _seconds(codecs: Sequence[Codec]) -> float:
    """Return the time of a session of one layer."""
    shape, start = SHAPES[0], time.perf_counter()
    cache = CompressedKVCache(codecs[0], codecs[1])
    for count in (CHUNK, *[1] * _STEPS):
        history, _ = cache.update_and_fetch(*(vectors(shape, count) for _ in TENSORS))
        q = mx.random.normal((1, shape.query_heads, count, shape.head_dim)).astype(mx.float16)
        mx.eval(history.attend(q, shape.scale, "causal" if count > 1 else None))
    return time.perf_counter() - start
