"""Reading GGUF files: every type of tensor that llama.cpp's package decodes, and damaged files."""

from __future__ import annotations

import struct
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import _type_traits, dequantize, quantize

from tests.gguf_files import write_gguf, write_llama, write_tensor
from veloxlab.errors import InputError
from veloxlab.models import gguf
from veloxlab.models.gguf import open_gguf

DECODED = [GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits]  # all types of `dequantize`

# types of tensors


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_every_type_is_decoded_in_parts_as_the_package_decodes_it_whole(tmp_path, kind, monkeypatch):
    values, size = GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 60, (3, 512 // values * size), np.uint8)  # small bytes: finite floats
    path = write_gguf(tmp_path / "x.gguf", "llama", {"x.weight": (rows, kind)}, {})
    monkeypatch.setattr(gguf, "AT_ONCE", 512)
    read = open_gguf(path).read("x.weight", mx.float32)
    assert read.shape == (3, 512)
    np.testing.assert_array_equal(np.array(read), dequantize(rows, kind))


@pytest.mark.parametrize(("name", "step"), [("Q8_0", 1 / 127), ("Q5_0", 2 / 16), ("Q4_1", 2 / 15), ("BF16", 2**-8)])
def test_decoded_values_equal_the_encoded_ones(tmp_path, name, step):
    """To half a step of the widest value of a block, or one step at the end that Q5_0 does not reach."""
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).uniform(-1, 1, (4, 96)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", "llama", {"x.weight": (quantize(values, kind), kind)}, {})
    assert abs(np.array(open_gguf(path).read("x.weight", mx.float32)) - values).max() <= 0.51 * step


def test_type_that_the_package_does_not_decode_is_named(tmp_path):
    kind = GGMLQuantizationType.Q8_K
    path = write_gguf(tmp_path / "x.gguf", "llama", {"x.weight": (np.zeros((1, 292), np.uint8), kind)}, {})
    with pytest.raises(InputError, match=r"x\.gguf: the tensor x\.weight has the type Q8_K, which .* cannot decode"):
        open_gguf(path).read("x.weight", mx.float32)


def test_file_is_mapped_read_only(tmp_path):
    """Installed weights can belong to another user."""
    assert not open_gguf(write_llama(tmp_path / "tiny.gguf")).tensors["output_norm.weight"].stored.flags.writeable


def test_metadata_of_every_type_is_read(tmp_path):
    values = {
        "a": "text",
        "b": 7,
        "c": -1.5,
        "d": True,
        "e": ["ä", ""],
        "f": [1, 2],
        "add_key_length": 2**20,
        "g": [False],
    }
    read = open_gguf(write_gguf(tmp_path / "x.gguf", "llama", {}, values)).metadata
    assert {key: read[key] for key in values if len(key) == 1} == {k: v for k, v in values.items() if len(k) == 1}
    assert read["llama.attention.key_length"] == 2**20


def test_package_imports_without_torch():
    loaded = "import sys, veloxlab.models.gguf; assert not {'torch', 'mlx_lm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", loaded], check=True)


# bad files


def test_missing_gguf_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*gone\.gguf"):
        open_gguf(tmp_path / "gone.gguf")


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.gguf is not a GGUF file: it starts with b'<htm'"):
        open_gguf(path)


def test_every_truncation_is_refused(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf", **{"tokenizer.ggml.tokens": ["a", "word"]})
    whole = path.read_bytes()
    for length in [*range(4, 1500, 7), len(whole) // 2, len(whole) - 32]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"tiny\.gguf is damaged or cut off"):
            open_gguf(path)


NAME, SIZES = 24, 44  # offsets of the only tensor's name and sizes


@pytest.mark.parametrize(
    ("at", "number", "message"),
    [
        (8, 2**63, "ends too early|do not fit"),  # tensors
        (16, 2**62, "ends too early|Duplicate"),  # values of metadata
        (NAME, 2**64 - 1, "ends too early"),  # bytes of a name
        (SIZES, 2**40, "do not fit"),
        (SIZES, 2**63, "do not fit"),  # times 2 is 0 in 64 bits
        (SIZES, 0, "do not fit"),
        (SIZES + 20, 2**50, "ends too early"),  # offset of its data
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_read(tmp_path, at, number, message):
    path = write_tensor(tmp_path / "x.gguf", 0, (2, 2), bytes(16))
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 8] = struct.pack("<Q", number)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=f"damaged or cut off: .*({message})"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IIQ", 9, 8, 2**60), "ends too early"),  # strings
        (struct.pack("<IIQ", 9, 4, 2**62), "ends too early"),  # numbers
        (struct.pack("<IIQ", 9, 9, 1), "list of values of the type ARRAY"),
        (struct.pack("<IIQ", 9, 77, 1), "77 is not a valid"),
        (struct.pack("<I", 77), "77 is not a valid"),
        (struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 2**64 - 1), "ends too early"),
    ],
)
def test_absurd_metadata_is_refused(tmp_path, value, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 3) + b"key" + value + bytes(16))
    with pytest.raises(InputError, match=f"damaged or cut off: .*{message}"):
        open_gguf(path)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    path = write_tensor(tmp_path / "x.gguf", 0, (2, 2), bytes(16), copies=2)
    with pytest.raises(InputError, match=r"duplicated tensor with name x\.weight; download it again"):
        open_gguf(path)


def test_row_that_ends_within_a_block_is_refused(tmp_path):
    path = write_tensor(tmp_path / "x.gguf", 2, (1, 40), bytes(64))
    with pytest.raises(InputError, match=r"row size \(40\) is not a multiple of Q4_0 block size"):
        open_gguf(path)


def test_unknown_version_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(InputError, match="GGUF version 1 is not read; versions 2 and 3 are"):
        open_gguf(path)


def test_other_byte_order_is_refused(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"x\.gguf is a big-endian GGUF file, which is not read"):
        open_gguf(tmp_path / "x.gguf")


def test_unknown_type_of_tensor_is_refused(tmp_path):
    path = write_tensor(tmp_path / "x.gguf", 99, (1, 256), bytes(84))
    with pytest.raises(InputError, match=r"tensor x\.weight has the type number 99, .* update that package"):
        open_gguf(path)
