"""A new back end is one `Backend` and one entry in `BACKENDS`: here one that runs NumPy on the CPU, eagerly."""

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.cache.counts import BLOCK
from veloxlab.checkup import SESSION_KERNELS
from veloxlab.codecs import METHODS
from veloxlab.kernels import checked, devices, text
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.devices import CUDA
from veloxlab.kernels.encode import sign_kernel
from veloxlab.kernels.text import Source


def test_a_launch_on_cuda_copies_no_text(monkeypatch, tmp_path):
    """MLX copies the text of a kernel at each launch, and searches its body for the array facts that it needs."""
    made = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **given: made.append(given))
    monkeypatch.setattr(text, "kept_in", lambda kind: tmp_path / kind)
    body = "y[0] = x[x_strides[0]] + z[0]; // " + "a comment " * 99
    source = Source("sum", ("x", "z"), ("y",), (("SIZE", 3),), ("simd.h",), body)
    CUDA.build(source)
    for part in ("header", "source"):
        (line,) = (line for line in made[0][part].splitlines() if line.startswith("#include"))
        path = Path(line.split('"')[1])
        assert ("SIZE" in path.read_text()) == (part == "header")
        assert ("x_strides" in path.read_text()) == (part == "source")
        path.write_text("what a crash has left")
    assert "x_strides" in made[0]["source"]
    assert not any(fact in made[0]["source"] for fact in ("x_shape", "z_strides"))
    CUDA.build(source)
    assert all("crash" not in path.read_text() for path in (tmp_path / "kernels").iterdir())
    monkeypatch.setattr(text, "kept_in", lambda kind: Path("/dev/null") / kind)  # a place without write access
    CUDA.build(source)
    assert "SIZE" in made[2]["header"]
    assert "x_strides" in made[2]["source"]


def build(source):
    """Return the kernel's function by name; it takes NumPy arrays in the order of its inputs."""
    functions = {"encode_signs": encode_signs}

    def kernel(*, inputs, output_shapes, output_dtypes, **_):
        given = dict(zip(source.inputs, map(np.asarray, inputs), strict=True))
        outputs = functions[source.name](**given)
        assert [tuple(array.shape) for array in outputs] == list(output_shapes)
        return [mx.array(array).astype(dtype) for array, dtype in zip(outputs, output_dtypes, strict=True)]

    return kernel


def encode_signs(x, y):
    signs = np.packbits(y >= 0, axis=-1, bitorder="little").view(np.uint32)
    return signs, np.sqrt(np.linalg.norm(x.astype(np.float32), axis=-1, keepdims=True) / math.sqrt(x.shape[-1]))


def test_a_back_end_is_one_object_and_one_entry(monkeypatch):
    monkeypatch.setattr(checked, "_states", {})
    codec = METHODS["qjl"].codec(64, 2, "keys")
    x = mx.random.normal((1, 2, 9, 64), key=mx.random.key(0)).astype(mx.float16)
    with monkeypatch.context() as ops:
        ops.setenv(devices.SWITCH, "0")  # MLX operations give the expected result
        wanted = codec.encode(x).arrays
    assert checked.states() == {}

    numpy = replace(devices.METAL, name="cpu", build=build, lazy=False)
    monkeypatch.setitem(devices.BACKENDS, "cpu", numpy)
    monkeypatch.setattr(devices.runtime, "backend", lambda: "cpu")  # type: ignore[attr-defined]
    found = codec.encode(x).arrays
    assert checked.states() == {"agrees": 1}
    assert all(mx.array_equal(found[name], array) for name, array in wanted.items())


def test_inputs_of_an_eager_back_end_are_computed_before_a_launch(monkeypatch):
    """A function that reads memory needs computed arrays; a lazy back end leaves the order to MLX."""
    evaluated = []
    monkeypatch.setattr(mx, "eval", lambda arrays: evaluated.extend(arrays))
    for lazy, count in ((True, 0), (False, 2)):
        backend = replace(devices.METAL, build=lambda _: lambda **_: [mx.zeros((1,))] * 2, lazy=lazy)
        run_vectors(sign_kernel(32, 32), backend, mx.zeros((1, 1, 1, 32)), mx.zeros((1, 1, 1, 32)))
        assert len(evaluated) == count


def test_a_session_of_a_model_builds_the_number_of_kernels_that_doctor_states(monkeypatch):
    """A prompt is read in two chunks, and a block of the answer leaves the window, with the defaults."""
    names = []

    def built(source):
        names.append(source.name)
        return lambda *, output_shapes, output_dtypes, **_: list(map(mx.zeros, output_shapes, output_dtypes))

    monkeypatch.setitem(devices.BACKENDS, "cpu", replace(devices.CUDA, build=built, tried=False))
    model = tiny("llama")
    cache = vl.make_cache(model)
    for count in (200, 200, *[1] * (BLOCK + 1)):
        mx.eval(model(mx.zeros((1, count), mx.int32), cache=cache))
    assert sorted(names) == ["attend_table_table", "combine", "encode", "encode", "expand_table", "slide"]
    assert len(names) == SESSION_KERNELS
