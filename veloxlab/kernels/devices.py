"""The machines that run kernels. A new one is a `Backend` in a file of its own, and an entry in `BACKENDS`."""

from __future__ import annotations

import os
from functools import partial

import mlx.core as mx

from veloxlab import runtime
from veloxlab.kernels.backend import Backend, build_with_mlx

SWITCH = "VELOXLAB_KERNELS"  # 0 in the environment: no kernel, MLX operations do everything

METAL = Backend(
    name="metal",
    build=partial(build_with_mlx, "metal"),
    types={mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"},
    shared_bytes=32 * 1024,
    table_words=4096,
    pair_words=2,
    shares=(4, 4),
    points_each=4,
    least_size=8,  # MLX puts a smaller array in the `constant` address space, and a body's pointers are to one space
)
CUDA = Backend(
    name="cuda",
    build=partial(build_with_mlx, "cuda"),
    types={mx.float32: "float", mx.float16: "half", mx.bfloat16: "__nv_bfloat16"},
    shared_bytes=48 * 1024,
    table_words=8192,
    pair_words=1,
    shares=(4, 8),
    points_each=8,
)
BACKENDS = {backend.name: backend for backend in (METAL, CUDA)}


def current_backend() -> Backend | None:
    """That of MLX's default device, or None where no kernel runs, or ``VELOXLAB_KERNELS=0`` forbids kernels."""
    return None if os.environ.get(SWITCH) == "0" else BACKENDS.get(runtime.backend())
