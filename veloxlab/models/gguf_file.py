"""Reads GGUF files, the format of llama.cpp: metadata as Python values, tensors as float32 MLX arrays.

MLX's own reader opens the file for writing, which fails on an installed package; a cut-off download ends its process;
and it decodes half of every Q4_K block with the scale of the other half. This one maps the file read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from veloxlab.errors import InputError

T = TypeVar("T")

SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9


class Layout(NamedTuple):
    """How one kind of tensor is stored: blocks of ``items`` values in ``size`` bytes, and what decodes them."""

    name: str
    items: int
    size: int
    decode: Callable[[mx.array], mx.array]


def _view(columns: mx.array, dtype: mx.Dtype) -> mx.array:
    return mx.view(mx.contiguous(columns), dtype).astype(mx.float32)


def _half(blocks: mx.array, start: int) -> mx.array:
    return _view(blocks[:, start : start + 2], mx.float16)


def _nibbles(packed: mx.array) -> mx.array:
    """Split bytes [..., n] into 4-bit numbers [..., 2n]: all the low halves, then all the high ones."""
    return mx.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_k(blocks: mx.array) -> mx.array:
    """Eight groups of 32; their 6-bit scales and minima share twelve bytes, the last four in two pieces each."""
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = mx.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = mx.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return codes * (_half(blocks, 0) * scales)[..., None] - (_half(blocks, 2) * minima)[..., None]


def _q6_k(blocks: mx.array) -> mx.array:
    """Sixteen groups of 16 with 8-bit scales; the upper two bits of the codes lie apart from the lower four."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> mx.array([[0], [2], [4], [6]], mx.uint8) & 3
    codes = (low | (high.reshape(-1, 2, 128) << 4)).reshape(-1, 16, 16) - 32.0
    return codes * (_view(blocks[:, 192:208], mx.int8) * _half(blocks, 208))[..., None]


LAYOUTS = {
    0: Layout("F32", 1, 4, lambda blocks: _view(blocks, mx.float32)),
    1: Layout("F16", 1, 2, lambda blocks: _view(blocks, mx.float16)),
    2: Layout("Q4_0", 32, 18, lambda blocks: (_nibbles(blocks[:, 2:]) - 8.0) * _half(blocks, 0)),
    3: Layout("Q4_1", 32, 20, lambda blocks: _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)),
    8: Layout("Q8_0", 32, 34, lambda blocks: _view(blocks[:, 2:], mx.int8) * _half(blocks, 0)),
    12: Layout("Q4_K", 256, 144, _q4_k),
    14: Layout("Q6_K", 256, 210, _q6_k),
    30: Layout("BF16", 1, 2, lambda blocks: _view(blocks, mx.bfloat16)),
}


class Tensor(NamedTuple):
    """Where a tensor lies: ``shape`` is row-major (rows first), ``start`` and ``end`` count bytes of the file."""

    shape: tuple[int, ...]
    layout: Layout
    start: int
    end: int


@dataclass(frozen=True)
class Gguf:
    """An opened GGUF file: ``metadata`` by key, ``tensors`` by name; ``read`` decodes one tensor."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    content: npt.NDArray[np.uint8]

    def value(self, key: str, kind: type[T], otherwise: T | None = None) -> T:
        """Give a metadata value, or ``otherwise`` where there is none; raises `InputError` if it is no ``kind``."""
        found = self.metadata.get(key, otherwise)
        if not isinstance(found, kind):
            said = f"{self.path} has no metadata value {key} of the type {kind.__name__}"
            raise InputError(f"{said}; convert the model to GGUF again.")
        return found

    def read(self, name: str) -> mx.array:
        """Decode the tensor called ``name`` to float32, in its own shape; not evaluated."""
        shape, layout, start, end = self.tensors[name]
        return layout.decode(mx.array(self.content[start:end]).reshape(-1, layout.size)).reshape(shape)


class _Cursor:
    """Reads values one after another; a length that runs past the end of the file is a ``ValueError``."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self.content, self.at = content.data, 0

    def take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self.content):
            raise ValueError("it ends too early")
        self.at, start = end, self.at
        return self.content[start:end]

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return bytes(self.take(self.number())).decode("utf-8", "replace")

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"it has a value of the unknown type {kind}")
        form = np.dtype(f"<{SCALARS[kind]}")
        return list(np.frombuffer(self.take(count * form.itemsize), form).tolist())

    def value(self) -> Any:  # noqa: ANN401
        kind = self.number(4)
        return self.values(self.number(4), self.number()) if kind == ARRAY else self.values(kind, 1)[0]


def open_gguf(path: Path) -> Gguf:
    """Open a GGUF file and read all but the tensors' data, which is mapped; `InputError` if it cannot be read here."""
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the path of a GGUF file.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it starts with {magic!r} where GGUF files start with b'GGUF'.")
    content = np.memmap(path, np.uint8, mode="r")
    try:
        return Gguf(path, *_read_header(_Cursor(content)), content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged or cut off: {error}; download it again.") from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cursor.take(4)
    version = cursor.number(4)
    if version not in (2, 3):
        raise InputError(f"GGUF version {version} is not read; versions 2 and 3 are.")
    tensor_count, value_count = cursor.number(), cursor.number()
    metadata = {cursor.string(): cursor.value() for _ in range(value_count)}
    tensors: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.number() for _ in range(cursor.number(4)))[::-1]
        kind, start = cursor.number(4), cursor.number()
        if kind not in LAYOUTS:
            known = ", ".join(layout.name for layout in LAYOUTS.values())
            raise InputError(f"the tensor {name} has the format number {kind}, which is not read; {known} are.")
        layout = LAYOUTS[kind]
        tensors[name] = Tensor(shape, layout, start, start + math.prod(shape) // layout.items * layout.size)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment}")
    data = math.ceil(cursor.at / alignment) * alignment
    for name, tensor in tensors.items():
        tensors[name] = tensor._replace(start=data + tensor.start, end=data + tensor.end)
        if data + tensor.end > len(cursor.content):
            raise ValueError(f"the data of the tensor {name} ends after the file does")
    return metadata, tensors
