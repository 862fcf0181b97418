"""CUDA kernels that are compiled once for all processes.

MLX 0.32 compiles a custom kernel anew in each process, with headers that take the compiler a second. It first looks for
a compiled one in the folder where it keeps its own kernels, under a name with a checksum of the text. `keep` compiles a
kernel for that folder, by the same compiler, without those headers, of which our text needs three types. If anything is
not as expected, MLX does not find the file, and compiles the kernel itself.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from veloxlab.errors import InputError
from veloxlab.store import write_atomically

_VERSIONS = "0.32."  # of MLX, whose texts and files these are
_LIBRARIES = "libnvrtc.so.13", "libnvrtc.so.12"
_TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "uint32_t",
    mx.int32: "int32_t",
    mx.uint8: "uint8_t",
}
_BEFORE = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
HEADERS = {
    "mlx/backend/cuda/device/utils.cuh": """#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned int uint32_t;
namespace mlx::core::cu {
template <typename T>
struct OfDimensions {
  T of[10];
  __device__ T operator[](int i) const { return of[i]; }
};
using Shape = OfDimensions<int>;
using Strides = OfDimensions<long long>;
}
""",
    "cooperative_groups.h": "namespace cooperative_groups {}\n",
}
"""What a text includes, in place of MLX's and NVIDIA's files: `Shape` and `Strides` are as many bytes as theirs."""
_SEED = 0xC70F6907  # of std::hash, as that of the next function
_HASH = "_ZSt11_Hash_bytesPKvmm"


FUNCTION = "custom_kernel_"  # before the name of a kernel that is not MLX's own


class Kernel(NamedTuple):
    """A kernel of ``mx.fast.cuda_kernel``, by what that got."""

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    header: str
    body: str

    @property
    def function(self) -> str:
        """The name of its function."""
        return f"{FUNCTION}{self.name}"

    def text(self, inputs: Sequence[mx.array], types: Sequence[mx.Dtype]) -> str:
        """The text that MLX makes of it for ``inputs`` and outputs of ``types``."""
        lines = []
        for name, array in zip(self.inputs, inputs, strict=True):
            lines.append(f"    const {_TYPES[array.dtype]}* {name}")
            for fact, kind in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
                if array.ndim and f"{name}_{fact}" in self.body:
                    lines.append(f"    const __grid_constant__ {kind} {name}_{fact}")
        lines += [f"    {_TYPES[dtype]}* {name}" for name, dtype in zip(self.outputs, types, strict=True)]
        return (
            f"{_BEFORE}{self.header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
            f"__global__ void {self.function}(\n" + ",\n".join(lines) + f") {{\n{self.body}"
            "\n}\n\n} // namespace mlx::core::cu\n"
        )


def keep(kernel: Kernel, inputs: Sequence[mx.array], types: Sequence[mx.Dtype]) -> None:
    """Compile a kernel for MLX's folder, unless it is there."""
    if not _version().startswith(_VERSIONS):
        return
    with suppress(OSError, AttributeError, KeyError, InputError):
        text = kernel.text(inputs, types)
        path = folder() / f"{kernel.function}_{_hash(text.encode()):x}.ptx"
        if path.exists():
            return
        made = compiled(text, f"mlx::core::cu::{kernel.function}", _options())
        if made is not None:
            code, mangled = made
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path.with_suffix(".txt"), f"mlx::core::cu::{kernel.function}\t{mangled}\n".encode())
            write_atomically(path, code)  # MLX looks for this one


def compiled(text: str, function: str, options: Sequence[str]) -> tuple[bytes, str] | None:
    """Machine code of a text and the name of its function there; None if it does not compile.

    Raises OSError without NVIDIA's compiler.
    """
    nvrtc, program = _compiler(), ctypes.c_void_p()
    names, texts = _strings([*HEADERS]), _strings([*HEADERS.values()])
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", len(HEADERS), texts, names)
    try:
        nvrtc.nvrtcAddNameExpression(program, function.encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), _strings(options)) != 0:
            return None
        size, mangled = ctypes.c_size_t(), ctypes.c_char_p()
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        nvrtc.nvrtcGetLoweredName(program, function.encode(), ctypes.byref(mangled))
        return (code.raw, mangled.value.decode()) if mangled.value else None
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def options_for(major: int, minor: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Options of the compiler: the processor, as MLX chooses it, and folders with NVIDIA's headers."""
    beside = Path(mx.__file__).parent.parent / "nvidia"
    homes = [environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [
        beside / "cu13",
        beside / "cuda_runtime",
        *(Path(home) for home in homes if home),
        Path("/usr/local/cuda"),
    ]
    of_architecture = f"--gpu-architecture=sm_{major}{minor}{'a' if major >= 9 else ''}"
    return [of_architecture, *(f"--include-path={folder / 'include'}" for folder in folders)]


@cache
def _version() -> str:
    return version("mlx")


def beside_text() -> str:
    """All that machine code depends on besides a kernel's text: options and headers; no options without such a GPU."""
    options: list[str] = []
    with suppress(KeyError, ValueError, RuntimeError):
        options = _options()[:1]
    return "".join([*options, *HEADERS.values()])


@cache
def _options() -> list[str]:
    info = mx.device_info(mx.gpu)
    return options_for(int(info["compute_capability_major"]), int(info["compute_capability_minor"]))


def folder() -> Path:
    """MLX's folder of compiled kernels, its own and ours."""
    own = os.environ.get("MLX_PTX_CACHE_DIR")
    if own:
        return Path(own)
    temporary = (os.environ.get(name) for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))
    return Path(next(filter(None, temporary), "/tmp")) / "mlx" / _version() / "ptx"


def _hash(text: bytes) -> int:
    """``std::hash`` of a string, as MLX's C++ library computes it."""
    function = getattr(ctypes.CDLL("libstdc++.so.6"), _HASH)
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return int(function(text, len(text), _SEED))


@cache
def _compiler() -> Any:  # noqa: ANN401 - a library's functions
    for name in _LIBRARIES:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("There is no NVRTC.")


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))
