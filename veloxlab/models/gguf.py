"""Opens GGUF files, the format of llama.cpp, with its package ``gguf``: metadata, and tensors as MLX arrays."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import READER_SUPPORTED_VERSIONS, GGUFReader, ReaderField
from gguf.quants import dequantize

from veloxlab.errors import InputError

T = TypeVar("T")

AT_ONCE = 2**18  # values decoded at once, 1 MiB in float32: for more, NumPy asks the system for new memory each time


class _Reader(GGUFReader):
    """The package's reader, which maps the file, with checks of all sizes.

    A slice beyond the end of a map is short without an error, and a wrong length can run a long loop. So each size is
    compared with the file's size before the read. Lists are read in one step: the package makes an array for each word
    of a vocabulary, which takes seconds.
    """

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        self._check_end(int(offset) + int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, override_order)

    def _check_end(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError("it ends too early")

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, int(raw_type))
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == GGUFValueType.STRING:
            values, end = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[kind], count)
            end = start + values.nbytes
        else:
            raise ValueError(f"it has a list of values of the type {kind.name}")
        return end - orig_offs, [values], [0], [GGUFValueType.ARRAY, kind]

    def _strings(self, at: int, count: int) -> tuple[npt.NDArray[Any], int]:
        self._check_end(at + 8 * count)
        content, found = self.data.data, []
        for _ in range(count):
            start = at + 8
            at = start + struct.unpack_from("<Q", content, at)[0]
            self._check_end(at)
            found.append(str(content[start:at], "utf-8", "replace"))
        return np.array(found, dtype=object), at

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        field = super()._get_tensor_info_field(orig_offs)
        _, _, _, sizes, kind, _ = field.parts
        if kind[0] not in GGML_QUANT_SIZES:
            raise InputError(
                f"the tensor {field.name} has the type number {kind[0]}, which the gguf package does not know; "
                "update that package."
            )
        if not 0 < math.prod(sizes.tolist()) <= 8 * len(self.data) or not len(sizes):  # at most 8 to a byte
            raise ValueError(f"the tensor {field.name} has the sizes {sizes.tolist()}, which do not fit into the file")
        return field


class Tensor(NamedTuple):
    """A tensor in the file: ``shape`` is row-major (rows first), ``stored`` its bytes, mapped and not read."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    stored: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Gguf:
    """An opened GGUF file: ``metadata`` by key, ``tensors`` by name; ``read`` decodes one tensor."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def value(self, key: str, kind: type[T], otherwise: T | None = None) -> T:
        """Return a metadata value, or ``otherwise`` if there is none; raises `InputError` if it is no ``kind``."""
        found = self.metadata.get(key, otherwise)
        if not isinstance(found, kind):
            said = f"{self.path} has no metadata value {key} of the type {kind.__name__}"
            raise InputError(f"{said}; convert the model to GGUF again.")
        return found

    def read(self, name: str, dtype: mx.Dtype) -> mx.array:
        """Decode the tensor ``name`` to ``dtype`` in its own shape; only a part at a time is in float32."""
        shape, kind, stored = self.tensors[name]
        values, size = GGML_QUANT_SIZES[kind]
        step = AT_ONCE // values * size
        parts = []
        for start in range(0, len(stored), step):
            try:
                decoded = dequantize(stored[None, start : start + step], kind)
            except NotImplementedError:
                said = f"{self.path}: the tensor {name} has the type {kind.name}, which the gguf package cannot decode"
                raise InputError(f"{said}; give a file of other types, such as Q8_0 or F16.") from None
            parts.append(mx.array(decoded).astype(dtype))
            mx.eval(parts[-1])
        whole = (parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)).reshape(shape)
        mx.eval(whole)
        return whole


def open_gguf(path: Path) -> Gguf:
    """Open a GGUF file and read all but the data of tensors, which is mapped; `InputError` if it is not valid."""
    if not path.is_file():
        raise InputError(f"There is no file {path}; give the path of a GGUF file.")
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it starts with {magic!r} where GGUF files start with b'GGUF'.")
    if len(version) == 4 and (number := int.from_bytes(version, "little")) not in READER_SUPPORTED_VERSIONS:
        if int.from_bytes(version, "big") in READER_SUPPORTED_VERSIONS:
            raise InputError(f"{path} is a big-endian GGUF file, which is not read; download the little-endian one.")
        raise InputError(f"{path}: GGUF version {number} is not read; versions 2 and 3 are.")
    try:
        reader = _Reader(path)
        tensors = {
            one.name: Tensor(tuple(one.shape[::-1].tolist()), one.tensor_type, one.data.reshape(-1).view(np.uint8))
            for one in reader.tensors
        }
        return Gguf(path, {key: _value(field) for key, field in reader.fields.items()}, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(f"{path} is damaged or cut off: {error.args[0]}; download it again.") from error


def _value(field: ReaderField) -> Any:  # noqa: ANN401
    value = field.parts[-1]
    if field.types[0] == GGUFValueType.STRING:
        return value.tobytes().decode("utf-8", "replace")
    return value.tolist() if field.types[0] == GGUFValueType.ARRAY else value[0].item()
