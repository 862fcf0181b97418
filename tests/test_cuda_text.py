"""The CUDA text of attention, for every layout of codes, and of an encoder compiles: ``nvcc`` needs no GPU.

Nothing is run.
"""

import re
import shutil
import subprocess
from dataclasses import replace

import mlx.core as mx
import pytest

from tests.metal_on_host.kept import kept
from tests.test_kernels_on_host import CASES as TABLES
from tests.test_kernels_on_host import Case, calls
from tests.test_readers_on_host import CASES as OTHERS
from tests.test_readers_on_host import TRELLISES, Polar, Trellis
from veloxlab.codecs.commvq import CommVQ
from veloxlab.kernels.backend import run_vectors
from veloxlab.kernels.compiled import HEADERS, Kernel
from veloxlab.kernels.devices import CUDA

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc to compile CUDA text")

FLAGS = ["-arch=sm_90", "-std=c++17", "-ptx", "-Xcicc", "-O0", "-x", "cu"]
# the keys' levels have a copy for every lane, the values' table has not
TWO_TABLES = [Case(Trellis(2.25, beside="turned"), Polar((8, 8, 8)), 128, 8)]


def ptx(text):
    """Return the file with a text's PTX; a text that compiled is cached, and not compiled again."""

    def made(path):
        command = ["nvcc", *FLAGS, "-o", str(path), "-"]
        subprocess.run(command, input=text, capture_output=True, text=True, check=True)

    return kept(".ptx", "nvcc", FLAGS, text, made)


def compiled(text):
    """Return the compiler's messages on a text."""
    try:
        return ptx(text) and ""
    except subprocess.CalledProcessError as error:
        return error.stderr


def kernel_text(source, inputs, outputs):
    kernel = Kernel(source.name, source.inputs, source.outputs, source.header("cuda.h"), source.body)
    lines = kernel.text(inputs, outputs).splitlines()
    included = {f"#include {mark}": text for name, text in HEADERS.items() for mark in (f'"{name}"', f"<{name}>")}
    return "\n".join(included.get(line, line) for line in lines) + "\n"


def without_launches(texts):
    """Return a back end that adds the text of each kernel to ``texts``, and runs none."""

    def built(source):
        def kernel(*, inputs, output_shapes, output_dtypes, **_):
            texts.append(kernel_text(source, inputs, output_dtypes))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return kernel

    return replace(CUDA, build=built, large_bytes=lambda: 200 << 10)


@pytest.mark.parametrize("case", TABLES[::4] + OTHERS + TRELLISES + TWO_TABLES, ids=str)
def test_attention_compiles_and_its_memory_fits(case):
    """A processor of an H200 has 227 KB of threadgroup memory: 27 KB beside a table with a copy for every lane."""
    texts = []
    next(calls(case, [(33, 4, 5)])).attend(case, without_launches(texts))
    assert len(texts) == (1 if "COMBINES 1" in texts[0] else 2)
    assert compiled(texts[0]) == ""
    used = sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", ptx(texts[0]).read_text())))
    assert 0 < used <= (27 << 10 if "extern __shared__" in texts[0] else 48 << 10)


@pytest.mark.parametrize("dim", [128, 576])
def test_encoding_by_sums_compiles(dim):
    texts = []
    kernel = CommVQ(dim, 1, "values", stages=3).blank(2)._encoder
    run_vectors(kernel, without_launches(texts), mx.zeros((1, 2, 5, dim), mx.float16))
    assert [compiled(text) for text in texts] == [""]


def test_an_invalid_text_does_not_compile():
    assert "no_such" in compiled("__global__ void kernel() { no_such(); }")
