"""The devices that run kernels. A new one is a `Backend` in its own file, and an entry in `BACKENDS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import mlx.core as mx

from veloxlab import runtime
from veloxlab.kernels.attend import attend_kernel
from veloxlab.kernels.backend import Backend
from veloxlab.kernels.text import build_with_mlx

_EXPANDED_BYTES, _EXPANDED_TOKENS = 256 << 20, 1 << 24  # on a GPU launches of small tiles take longer
EXPANDED = "VELOXLAB_EXPANDED_MB"  # environment: MB of decoded keys and values of a layer
# environment: with 0 there are no kernels, and MLX operations do all work. A cache in use reads it once for each block,
# because that takes 6 µs a layer, a fifth of a step's Python
SWITCH = "VELOXLAB_KERNELS"


def _on_cpu(module: str, name: str) -> Callable[..., Any]:
    """A function of ``kernels/cpu/``, imported at its first call, because the import of Numba takes a second."""
    return lambda *given: getattr(import_module(f"veloxlab.kernels.cpu.{module}"), name)(*given)


def _large_bytes() -> int:
    """Threadgroup memory of data centres' GPUs: a processor of Hopper or Blackwell has 227 KB for one threadgroup."""
    info = mx.device_info(mx.gpu)
    return 200 * 1024 if info.get("compute_capability_major") in (9, 10) else 0


METAL = Backend(
    name="metal",
    attention=attend_kernel,
    build=partial(build_with_mlx, "metal"),
    types={mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"},
    shared_bytes=32 * 1024,
    groups=264,
    table_words=4096,
    pair_words=2,
    shares=(4, 4),
    product_tokens=8,
    points_each=4,
    expanded_bytes=_EXPANDED_BYTES,
    expanded_tokens=_EXPANDED_TOKENS,
    least_size=8,  # MLX puts smaller arrays in the `constant` address space, and a body's pointers are to one space
)
CUDA = Backend(
    name="cuda",
    attention=attend_kernel,
    build=partial(build_with_mlx, "cuda"),
    types={mx.float32: "float", mx.float16: "half", mx.bfloat16: "__nv_bfloat16"},
    shared_bytes=48 * 1024,
    groups=512,  # an H200 runs 528 together, some of which have exact tokens
    table_words=8192,
    large_bytes=cache(_large_bytes),
    large="extern __shared__ __align__(16) {kind} {name}[];",
    joins=True,
    knows_last=True,
    pair_words=1,
    shares=(4, 8),
    product_tokens=16,
    points_each=8,
    expanded_bytes=_EXPANDED_BYTES,
    expanded_tokens=_EXPANDED_TOKENS,
)
CPU = Backend(
    name="cpu",
    attention=lambda queries, tokens, _: _on_cpu("call", "attend_kernel")(queries, tokens),
    together=_on_cpu("call", "together"),
    types={mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16"},
    write=_on_cpu("expand", "write"),
    run=_on_cpu("run", "run"),
    lazy=False,
)
BACKENDS = {backend.name: backend for backend in (METAL, CUDA, CPU)}


def device_backend() -> Backend:
    """The back end of MLX's default device, whether kernels run there or not."""
    return BACKENDS[runtime.backend()]


def expanded_bytes() -> int:
    """Most bytes of decoded keys and values of a layer that reads a prompt, if heads can be read separately."""
    said = os.environ.get(EXPANDED, "")
    return int(said) * 10**6 if said.isdecimal() and int(said) else device_backend().expanded_bytes


def current_backend() -> Backend | None:
    """`device_backend`, or None if no kernel runs, or ``VELOXLAB_KERNELS=0`` forbids kernels."""
    backend = device_backend()
    if backend is CPU:
        return CPU if has_loops() else None
    return None if os.environ.get(SWITCH) == "0" else backend


def has_loops() -> bool:
    """Whether loops run on the CPU, whatever device MLX has."""
    return os.environ.get(SWITCH) != "0" and _has_compiler()


@cache
def _has_compiler() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None
