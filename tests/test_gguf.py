"""Reading GGUF files: every tensor format against another reader, and files that are damaged."""

from __future__ import annotations

import struct

import mlx.core as mx
import numpy as np
import pytest

from tests.gguf_files import random_content, write_llama, write_tensor
from veloxlab.errors import InputError
from veloxlab.models.gguf_file import LAYOUTS, open_gguf

# tensor formats, against MLX's own reader


@pytest.mark.parametrize("kind", [kind for kind, layout in LAYOUTS.items() if layout.name not in ("BF16", "Q4_K")])
def test_format_decodes_as_mlx_does(tmp_path, kind):
    layout = LAYOUTS[kind]
    path = write_tensor(tmp_path / "x.gguf", kind, (3, 512), random_content(layout, 3 * 512))
    decoded = open_gguf(path).read("x.weight")
    assert decoded.dtype == mx.float32
    expected = np.array(dequantized(mx.load(str(path)), layout))
    # MLX rounds Q6_K to float16
    np.testing.assert_allclose(np.array(decoded), expected, rtol=1e-3 if layout.name == "Q6_K" else 1e-6)


def test_bfloat16_decodes(tmp_path):
    numbers = mx.random.normal((3, 5)).astype(mx.bfloat16)
    path = write_tensor(tmp_path / "x.gguf", 30, (3, 5), np.array(numbers.view(mx.uint8)).tobytes())
    np.testing.assert_array_equal(np.array(open_gguf(path).read("x.weight")), np.array(numbers.astype(mx.float32)))


def test_q4_k_decodes_as_ggml_does(tmp_path):
    """By the loop of ggml's reference; MLX's reader (gguflib) uses the even groups' scales for the odd ones too."""
    blocks = np.frombuffer(random_content(LAYOUTS[12], 512), np.uint8).reshape(2, 144)
    path = write_tensor(tmp_path / "x.gguf", 12, (2, 256), blocks.tobytes())
    expected = [[value for group in range(8) for value in q4_k_group(block, group)] for block in blocks]
    np.testing.assert_allclose(np.array(open_gguf(path).read("x.weight")), expected, rtol=1e-5, atol=1e-4)


def q4_k_group(block, group):
    scale, least = block[:4].view(np.float16).astype(float)
    packed = [int(byte) for byte in block[4:16]]
    if group < 4:
        a, b = packed[group] & 63, packed[group + 4] & 63
    else:
        a = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
        b = packed[group + 4] >> 4 | packed[group] >> 6 << 4
    codes = block[16 + group // 2 * 32 :][:32] >> (4 * (group % 2)) & 15
    return codes * scale * a - least * b


def dequantized(arrays, layout):
    if "x.scales" not in arrays:
        return arrays["x.weight"].astype(mx.float32)
    bits = 8 if layout.name == "Q8_0" else 4
    scales, biases = (arrays[name].astype(mx.float32) for name in ("x.scales", "x.biases"))
    return mx.dequantize(arrays["x.weight"], scales, biases, 32, bits)


def test_file_is_mapped_read_only(tmp_path):
    """Installed weights may belong to another user."""
    assert not open_gguf(write_llama(tmp_path / "tiny.gguf")).content.flags.writeable


# bad files


def test_missing_gguf_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*gone\.gguf"):
        open_gguf(tmp_path / "gone.gguf")


def test_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.gguf is not a GGUF file: it starts with b'<htm'"):
        open_gguf(path)


def test_every_truncation_is_refused(tmp_path):
    path = write_llama(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for length in [4, 10, 23, 40, 300, 2000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"tiny\.gguf is damaged or cut off"):
            open_gguf(path)


def test_damaged_lengths_are_refused(tmp_path):
    path = write_tensor(tmp_path / "x.gguf", 0, (2, 2), bytes(16))
    damaged = bytearray(path.read_bytes())
    damaged[24:32] = b"\xff" * 8  # the length of the name
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged or cut off"):
        open_gguf(path)


def test_unknown_version_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(InputError, match="GGUF version 1 is not read; versions 2 and 3 are"):
        open_gguf(path)


def test_unknown_tensor_format_is_refused(tmp_path):
    path = write_tensor(tmp_path / "x.gguf", 10, (1, 256), bytes(84))
    with pytest.raises(InputError, match=r"tensor x.weight has the format number 10, .* Q4_K, Q6_K, BF16 are"):
        open_gguf(path)
