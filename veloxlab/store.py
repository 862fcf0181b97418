"""Files that veloxlab writes: complete or not at all, with a checksum, and with one sentence if a write fails.

A file is written in the same folder under a name of `_PART`, and then moved into place. It is locked during the write.
A part file without a lock is left from a process that was killed; the next write into that folder removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import platformdirs

from veloxlab.errors import InputError

if TYPE_CHECKING:
    import mlx.core as mx
    import polars as pl

T = TypeVar("T")
Content = bytes | Callable[[BinaryIO], object]  # content of a file, or a function that writes it
_PART = ".veloxlab-{}.part"
_BEFORE_SUM, _NO_SUM = b"sha256:", b"0" * 64  # in a Parquet file
_SHOWN = 160  # characters of an error
_BESIDE_ARRAYS = "veloxlab"  # key of our JSON in the metadata of a safetensors file
_exists, _is_folder = os.path.exists, os.path.isdir  # the methods of `Path` raise if a parent folder is not readable


def kept_in(kind: str, folder: str | Path | None = None) -> Path:
    """Return the folder of measurements of a ``kind``: the given one, or one in the user's cache."""
    return Path(folder) if folder else platformdirs.user_cache_path("veloxlab") / kind


def make_folder(folder: str | Path) -> Path:
    """Make a folder if it is missing; raises `InputError` if no file can be written into it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({_reason(error)}): choose another place.") from error
    check_place(folder / "file")
    return folder


def check_place(path: Path) -> None:
    """Raise `InputError` if no file can be written at ``path``, as a check before long work."""
    with _writing(path), _part_in(path.parent):
        if _is_folder(path):
            raise IsADirectoryError


def write_atomically(path: str | Path, content: Content) -> Path:
    """Replace ``path`` by ``content``, and return ``path``; as `write_together`."""
    write_together({Path(path): content})
    return Path(path)


def write_together(contents: Mapping[Path, Content]) -> None:
    """Replace files by new contents. A reader, or a crash, finds each file in its old or its new state.

    All are written before the first is replaced, so that a full disk changes none. Raises `InputError` if a write
    fails.
    """
    with ExitStack() as stack:
        parts = {}
        for path, content in contents.items():
            with _writing(path):
                parts[path], file = stack.enter_context(_part_in(path.parent))
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some disks report only here that they are full
        for path, part in parts.items():
            with _writing(path):
                part.replace(path)
        for left in {part for path in contents for part in path.parent.glob(_PART.format("*"))}:
            with suppress(OSError), left.open("r+b") as file:  # another user's, or in use
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


@contextmanager
def _part_in(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    while True:
        part = folder / _PART.format(secrets.token_hex(8))
        file = part.open("xb")
        with suppress(OSError):  # a file system without locks: no file there counts as a leftover
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process removed it as a leftover before the lock
    try:
        yield part, file
    finally:
        with suppress(OSError):  # close would repeat the failed write, whose error is already raised
            file.close()
        part.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an error of writing ``path`` into one `InputError`."""
    try:
        yield
    except InputError:  # an error of the content, not of the place
        raise
    except (OSError, ValueError) as error:
        said = f"{path} cannot be written ({_reason(error)}): choose another place."
        if _is_folder(path):
            said = f"{path} is a folder: give the name of a file in it."
        elif not (isinstance(error, PermissionError) or _is_folder(path.parent)):  # a folder that the user may not see
            said = f"There is no folder {path.parent}: make it, or choose another."
        raise InputError(said) from error


@contextmanager
def reading(what: str, path: Path | None, way_out: str) -> Iterator[None]:
    """Turn an error of reading ``path``, which is ``what``, into one `InputError`; without a path, it says "this"."""
    try:
        yield
    except Exception as error:  # a damaged file, or one of another version, can raise anything
        reason = in_short(error)
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif isinstance(error, KeyError):
            reason = f"it has no {error}"
        said = f"The {what} {path}" if path else f"This {what}"
        raise InputError(f"{said} cannot be read ({reason}): {way_out}.") from error


def in_short(error: Exception) -> str:
    """Return the beginning of an error's text in one line: parsers quote the file that they cannot read."""
    said = " ".join(str(error).split()).rstrip(".")
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def kept(path: Path, load: Callable[[Path], T], make: Callable[[], T], save: Callable[[T, Path], object]) -> T:
    """Return the object that ``load`` reads from ``path``, or the result of ``make``, which is saved there.

    If ``load`` refuses the file, a warning names it, and it is made again. If the result cannot be saved, a warning
    reports that, and the result is still returned.
    """
    if _exists(path):
        try:
            return load(path)
        except InputError as error:
            warnings.warn(f"{error} The file is made again now.", stacklevel=3)
    made = make()
    try:
        make_folder(path.parent)
        save(made, path)
    except InputError as error:
        warnings.warn(f"{error} The result is returned, but not saved.", stacklevel=3)
    return made


@dataclass
class Unfinished:
    """Results so far of a long run, in a file from which the same run continues after an interruption."""

    path: Path | None  # None for no file
    format: str  # of this kind of run
    facts: Mapping[str, Any]  # all inputs of the measurements, as JSON

    def read(self) -> Any:  # noqa: ANN401 - any JSON
        """Return what `put` wrote last for the same facts, or None; raises `InputError` for a damaged file."""
        if self.path is None or not _exists(self.path):
            return None
        with reading("unfinished run", self.path, "delete it and start again"):
            content = read_json(self.path, self.format)
        return content["rows"] if content["facts"] == self.facts else None

    def put(self, rows: Any) -> None:  # noqa: ANN401
        """Write the rows. If the write fails, the run continues, with a warning the first time."""
        if self.path is None:
            return
        try:
            if not _exists(self.path):
                make_folder(self.path.parent)
            write_json(self.path, self.format, {"facts": self.facts, "rows": rows}, indent=None)  # the fastest form
        except InputError as error:
            self.path = None
            warnings.warn(f"{error} The run continues, but its results are not saved before its end.", stacklevel=2)

    def remove(self) -> None:
        """Remove the file after the end of the run."""
        if self.path is not None:
            with suppress(OSError):  # the run has its result, and a file left behind does no harm
                self.path.unlink()


def digest(content: object, files: Iterable[bytes] = ()) -> str:
    """Return the SHA-256 of a JSON value and of the contents of files, in hex digits."""
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for file in files:
        found.update(file)
    return found.hexdigest()


def to_json(kind: str, content: Mapping[str, Any], files: Iterable[bytes] = (), indent: int | None = None) -> str:
    """Return ``content`` as JSON of a format, with ``sha256``, the checksum of it and of ``files``."""
    content = {"format": kind, **content}
    return json.dumps({**content, "sha256": digest(content, files)}, indent=indent)


def from_json(text: str | bytes, kind: str, files: Iterable[bytes] = ()) -> dict[str, Any]:
    """Undo `to_json`; ValueError if ``text`` is of another format, or the checksum does not match."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop("format", None) != kind:
        raise ValueError(f"it is not of the format {kind!r}")
    if content.pop("sha256", None) != digest({"format": kind, **content}, files):
        raise ValueError("its checksum does not match")
    return content


def write_json(path: str | Path, kind: str, content: Mapping[str, Any], indent: int | None = 1) -> Path:
    """Write ``content`` with `to_json`, and return ``path``."""
    return write_atomically(path, to_json(kind, content, indent=indent).encode())


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Read the content that `write_json` wrote; OSError or ValueError if it is missing or damaged."""
    return from_json(path.read_bytes(), kind)


def write_arrays(path: str | Path, kind: str, content: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> Path:
    """Write ``arrays`` as safetensors, with ``content`` by `to_json` in the same file; return ``path``."""
    import mlx.core as mx

    own = {name: arrays[name] for name in sorted(arrays)}
    said = to_json(kind, {**content, "arrays": [*own]}, bytes_of([*own.values()]))
    return write_atomically(path, lambda file: mx.save_safetensors(file, own, {_BESIDE_ARRAYS: said}))


def read_arrays(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Read content and arrays that `write_arrays` wrote; raises OSError, RuntimeError or ValueError as `read_json`."""
    import mlx.core as mx

    path.open("rb").close()  # OSError names the cause; MLX's error does not
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    arrays: dict[str, mx.array] = {name: loaded[0][name] for name in sorted(loaded[0])}
    mx.eval(arrays)
    content = from_json(loaded[1].get(_BESIDE_ARRAYS, "{}"), kind, bytes_of([*arrays.values()]))
    if content.pop("arrays") != [*arrays]:
        raise ValueError("its arrays are called otherwise")
    return content, arrays


def bytes_of(arrays: Sequence[mx.array]) -> Iterator[bytes]:
    """Yield the bytes of arrays, each after its shape and type, for a checksum."""
    import mlx.core as mx
    import numpy as np

    for array in arrays:
        yield f"{array.shape} {array.dtype}\n".encode()
        yield np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def write_parquet(path: str | Path, frame: pl.DataFrame, kind: str = "", facts: object = None) -> Path:
    """Write ``frame`` as Parquet, and return ``path``; with a format also ``facts``, as JSON, and a checksum."""
    said = {kind: json.dumps(facts), "checksum": (_BEFORE_SUM + _NO_SUM).decode()} if kind else None
    held = io.BytesIO()
    frame.write_parquet(held, metadata=said)
    return write_atomically(path, _with_sum(held.getvalue()) if kind else held.getvalue())


def read_parquet(path: Path, kind: str) -> tuple[pl.DataFrame, Any]:
    """Read a file of `write_parquet` with a format, the checksum first; OSError or ValueError as `read_json`."""
    import polars as pl

    content = path.read_bytes()
    if _with_sum(content) != content:
        raise ValueError("it has no checksum, or its checksum does not match")
    metadata = pl.read_parquet_metadata(io.BytesIO(content))
    if kind not in metadata:
        raise ValueError(f"it is not of the format {kind!r}")
    return pl.read_parquet(content), json.loads(metadata[kind])


def _with_sum(content: bytes) -> bytes:
    """Return the same file with its checksum in the reserved place, which counts as zeros."""
    start = content.rfind(_BEFORE_SUM) + len(_BEFORE_SUM)
    before, behind = content[:start], content[start + len(_NO_SUM) :]
    return before + hashlib.sha256(before + _NO_SUM + behind).hexdigest().encode() + behind
