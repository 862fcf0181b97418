"""CUDA kernels that are compiled for MLX's folder, where NVIDIA's compiler is: it needs no GPU."""

import ctypes
import secrets
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from veloxlab.kernels import compiled, text
from veloxlab.kernels.backend import built
from veloxlab.kernels.devices import CUDA
from veloxlab.kernels.text import Source

NVIDIA = find_spec("nvidia")
LIBRARY = (
    next(
        (p for folder in NVIDIA.submodule_search_locations for p in Path(folder).glob("*/lib/libnvrtc.so.1[23]")), None
    )
    if NVIDIA
    else None
)
needs_compiler = pytest.mark.skipif(LIBRARY is None, reason="needs NVIDIA's compiler: pip install nvidia-cuda-nvrtc")
KERNEL = compiled.Kernel(
    "veloxlab_sum",
    ("x", "y"),
    ("out", "more"),
    "#define STEP 2\n",
    "// x_strides y_shape\nout[0] = x[STEP * x_strides[0]];",
)
TYPES = [mx.float32, mx.float16]
COMPILED = compiled.compiled


@pytest.fixture
def given():
    return [mx.zeros((2, 3), mx.uint32), mx.zeros((4,), mx.bfloat16)]


def test_the_text_is_as_mlx_makes_it(given):
    assert KERNEL.text(given, TYPES) == (
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n#define STEP 2\n'
        "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
        "__global__ void custom_kernel_veloxlab_sum(\n"
        "    const uint32_t* x,\n    const __grid_constant__ Strides x_strides,\n"
        "    const __nv_bfloat16* y,\n    const __grid_constant__ Shape y_shape,\n"
        "    float* out,\n    __half* more) {\n"
        "// x_strides y_shape\nout[0] = x[STEP * x_strides[0]];\n}\n\n} // namespace mlx::core::cu\n"
    )


def test_a_number_has_no_shape(given):
    assert "Shape" not in KERNEL.text([given[0], mx.array(1.0)], TYPES)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the checksum of its library")
def test_the_checksum_is_that_of_the_c_library(tmp_path):
    some = "a text of some length"
    call = f'std::hash<std::string>{{}}("{some}")'
    lines = [f"#include <{name}>" for name in ("functional", "string", "cstdio")]
    program = "\n".join([*lines, f'int main() {{ printf("%zx", {call}); }}'])
    subprocess.run(["g++", "-x", "c++", "-", "-o", tmp_path / "hash"], input=program, text=True, check=True)
    told = subprocess.run([tmp_path / "hash"], capture_output=True, text=True, check=True).stdout
    assert f"{compiled._hash(some.encode()):x}" == told


@needs_compiler
def test_the_compiler_makes_machine_code_without_headers_of_mlx(given, monkeypatch):
    monkeypatch.setattr(compiled, "_compiler", lambda: ctypes.CDLL(str(LIBRARY)))
    options = compiled.options_for(9, 0)
    code, mangled = compiled.compiled(KERNEL.text(given, TYPES), f"mlx::core::cu::{KERNEL.function}", options)
    assert code.startswith(b"\x7fELF")
    assert mangled.encode() in code
    assert compiled.compiled("no_such();", KERNEL.function, options) is None


def test_a_processor_has_an_option_as_mlx_gives_it():
    assert compiled.options_for(8, 9, {})[0] == "--gpu-architecture=sm_89"
    assert compiled.options_for(9, 0, {})[0] == "--gpu-architecture=sm_90a"
    assert f"--include-path={Path('/own/include')}" in compiled.options_for(9, 0, {"CUDA_HOME": "/own"})


def test_kernels_for_other_processors_have_other_names(monkeypatch):
    names = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda *, name, **_: names.append(name))
    for option in ("sm_90a", "sm_90a", "sm_120a"):
        monkeypatch.setattr(compiled, "_options", lambda option=option: [option, "--include-path=here"])
        CUDA.build(Source("copy", ("x",), ("out",), (), (), "out[0] = x[0];"))
    assert names[0] == names[1] != names[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def made(text, function, options):
        return None if "no_such" in text else (f"code for {options}".encode(), "mangled")

    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "new" / "ptx"))
    monkeypatch.setattr(compiled, "compiled", made)
    monkeypatch.setattr(compiled, "_options", lambda: ["sm_90a"])
    monkeypatch.setattr(compiled, "_version", lambda: "0.32.4")
    return tmp_path / "new" / "ptx"


def test_a_kernel_is_kept_once_under_the_name_that_mlx_looks_for(folder, given, monkeypatch):
    compiled.keep(KERNEL, given, TYPES)
    checksum = compiled._hash(KERNEL.text(given, TYPES).encode())
    name = f"custom_kernel_veloxlab_sum_{checksum:x}"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.ptx", f"{name}.txt"]
    assert (folder / f"{name}.ptx").read_bytes() == b"code for ['sm_90a']"
    assert (folder / f"{name}.txt").read_text() == "mlx::core::cu::custom_kernel_veloxlab_sum\tmangled\n"
    monkeypatch.setattr(compiled, "compiled", None)  # it is not called again
    compiled.keep(KERNEL, given, TYPES)


def test_what_does_not_compile_is_left_to_mlx(folder, given):
    compiled.keep(KERNEL._replace(body="no_such();"), given, TYPES)
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_left_alone(folder, given):
    folder.parent.write_text("a file in its place")
    compiled.keep(KERNEL, given, TYPES)
    assert folder.parent.read_text() == "a file in its place"


@pytest.mark.parametrize("change", ["version", "type", "compiler"])
def test_whatever_is_not_as_expected_is_left_to_mlx(folder, given, change, monkeypatch):
    if change == "version":
        monkeypatch.setattr(compiled, "_version", lambda: "0.33.0")
    if change == "type":
        given = [given[0].astype(mx.int64), given[1]]
    if change == "compiler":
        monkeypatch.setattr(compiled, "compiled", COMPILED)
        monkeypatch.setattr(compiled, "_LIBRARIES", ("libnosuch.so",))
        compiled._compiler.cache_clear()
    compiled.keep(KERNEL, given, TYPES)
    assert not folder.exists()


def test_equal_kernels_of_layers_are_compiled_once_and_then_called_directly(monkeypatch):
    launched, kept = [], []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **_: lambda **given: launched.append(given))
    monkeypatch.setattr(text, "keep", lambda kernel, *_: kept.append(kernel.name))
    body = f"// {secrets.token_hex(8)}\nout[0] = x[0];"
    sources = [Source("copy", ("x",), ("out",), (), (), body) for _ in range(3)]
    given = {"inputs": [mx.zeros(1)], "output_dtypes": [mx.float32], "grid": (1, 1, 1)}
    backend = replace(CUDA, tried=False)
    before = built(sources[0], backend)
    before(**given)
    later = [built(source, backend) for source in sources]
    assert before not in later
    for function in later:
        function(**given)
    assert launched == [given] * 4
    assert len(kept) == 1
