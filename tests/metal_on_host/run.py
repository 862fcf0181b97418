"""Runs a kernel's body on a CPU, compiled with g++ against ``host.h``, which imitates the GPU.

It detects faults that a run can show: threads that do not all reach a barrier, races, accesses outside of an array, and
more threadgroup memory than Metal has.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.metal_on_host.kept import kept
from tests.metal_on_host.text import INCLUDES, PRELUDES, KernelError, body, defines, facts
from veloxlab.kernels.text import SIMD, Source

COMPILER = "g++" if sys.platform == "linux" else "g++ on Linux"
FLAGS = ("-std=c++20", "-O1", "-fvisibility=hidden", "-fPIC", "-w", *INCLUDES)
# Line tables are for messages; calls on each memory access and on undefined behaviour go to machine.cpp. No jump
# threading or tail calls, so that each barrier of the text is in the code once, at its place.
KERNEL_FLAGS = (
    *("-g1", "-fno-thread-jumps", "-fno-optimize-sibling-calls"),
    *("-fsanitize=thread,alignment,bounds,shift,integer-divide-by-zero", "-fno-sanitize-recover"),
    "--param=tsan-instrument-func-entry-exit=0",
)
LIBRARIES = ("-nostdlib", "-lm", "-lc", "-lgcc")
BFLOAT: np.dtype = np.dtype([("bfloat", np.uint16)])  # NumPy has no bfloat16
TYPES: dict[np.dtype, str] = {
    np.dtype(np.float32): "float",
    np.dtype(np.float16): "half",
    BFLOAT: "bfloat",
    np.dtype(np.int32): "int",
    np.dtype(np.uint32): "uint",
    np.dtype(np.uint8): "uchar",
}


class _Array(ctypes.Structure):
    """``host::Array``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("is_output", ctypes.c_uint64),
        ("shape", ctypes.c_int32 * 8),
        ("strides", ctypes.c_int64 * 8),
        ("region", ctypes.c_void_p),
    )


def run(
    source: Source,
    arrays: Mapping[str, np.ndarray],
    groups: tuple[int, int, int],
    threads: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[np.dtype],
) -> list[np.ndarray]:
    """Run a kernel on ``groups`` threadgroups of ``threads`` threads, as ``launch`` does on a GPU.

    ``arrays`` can be strided views; the gaps between their elements are NaN for the kernel. ``shapes`` and
    ``dtypes`` are the outputs', which stay NaN (integers: all bits 1) where nothing is written. Raises `KernelError`.
    """
    assert threads % SIMD == 0, f"{threads} threads are not whole simdgroups"
    assert threads <= 1024, f"{threads} threads in a threadgroup, where Metal has 1024"
    inputs = {name: arrays[name] for name in source.inputs}
    dtype_of = {name: array.dtype for name, array in inputs.items()}
    dtype_of.update(zip(source.outputs, dtypes, strict=True))
    library = _compiled(_text(source, {name: TYPES[dtype] for name, dtype in dtype_of.items()}))
    memory = {name: _memory(array) for name, array in inputs.items()}
    outputs = [np.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    given = [_array(name, memory[name], inputs[name]) for name in source.inputs]
    given += [_array(name, output, output, 1) for name, output in zip(source.outputs, outputs, strict=True)]
    failure = library.run((_Array * len(given))(*given), len(given), (ctypes.c_uint * 3)(*groups), threads)
    if failure is not None:
        raise KernelError(f"{source.name}: {_with_lines(failure.decode(), library)}")
    return outputs


def _memory(array: np.ndarray) -> np.ndarray:
    """Return the bytes from the first element of a view to its last, with all bits 1 between its elements."""
    if array.size == 0:
        return np.empty(0, np.uint8)
    extent = array.itemsize + sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    memory = np.full(extent, 0xFF, np.uint8)
    np.ndarray(array.shape, array.dtype, memory.data, strides=array.strides)[...] = array
    return memory


def _array(name: str, memory: np.ndarray, like: np.ndarray, is_output: int = 0) -> _Array:
    shape = (ctypes.c_int32 * 8)(*like.shape)
    strides = (ctypes.c_int64 * 8)(*(stride // like.itemsize for stride in like.strides))
    return _Array(name.encode(), memory.ctypes.data, memory.nbytes, is_output, shape, strides, None)


def _text(source: Source, types: Mapping[str, str]) -> str:
    place = {name: i for i, name in enumerate([*source.inputs, *source.outputs])}
    lines = [
        f"const {types[name]}* const {name} = (const {types[name]}*)host::arrays[{place[name]}].begin();"
        for name in source.inputs
    ]
    lines += [
        f"{types[name]}* const {name} = ({types[name]}*)host::arrays[{place[name]}].begin();" for name in source.outputs
    ]
    lines += [f"const auto* const {name}_{fact} = host::arrays[{place[name]}].{fact};" for name, fact in facts(source)]
    return (
        defines(source)
        + "".join(f'#include "{name}"\n' for name in ("host.h", *source.headers))
        + "#undef threadgroup\n#define threadgroup THREADGROUP\n#undef local_memory\n#define local_memory\n"
        + 'extern "C" void kernel() {\n'
        + "const uint3 thread_position_in_threadgroup = {host::current, 0, 0};\n"
        + "const uint3 threadgroup_position_in_grid = {host::position.x, host::position.y, host::position.z};\n"
        + "\n".join(lines)
        + "\n"
        + body(source)
        + "}\n"
    )


@functools.cache
def _compiled(text: str) -> ctypes.CDLL:
    def make(path: Path) -> None:
        _compile(*FLAGS, *KERNEL_FLAGS, "-c", "-x", "c++", "-", "-o", f"{path}.o", text=text)
        _compile("-shared", f"{path}.o", str(_machine()), "-o", str(path), *LIBRARIES)

    library = ctypes.CDLL(str(kept(".so", COMPILER, [*FLAGS, *KERNEL_FLAGS, *LIBRARIES], text, make)))
    library.run.restype = ctypes.c_char_p
    return library


@functools.cache
def _machine() -> Path:
    flags = [*FLAGS, "-O2"]
    source = PRELUDES / "machine.cpp"
    return kept(".o", COMPILER, flags, "", lambda path: _compile(*flags, "-c", str(source), "-o", str(path)))


def _compile(*arguments: str, text: str | None = None) -> None:
    outcome = subprocess.run([COMPILER, *arguments], input=text, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise KernelError(outcome.stderr[:4000])


def _with_lines(message: str, library: ctypes.CDLL) -> str:
    """Return a message with file and line for each ``{address}``, and with its callers."""
    return re.sub(r"\{(\w+)\}", lambda found: _place(found[1], library._name), message)


def _place(address: str, library: str) -> str:
    command = ["addr2line", "--inlines", "--exe", library, address]
    frames = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [Path(frame).name.split(" ")[0] for frame in frames]
    return " < ".join(line for line in lines if not line.startswith("host.h:"))
