"""Files that veloxlab writes: whole or not at all, under a checksum, or one sentence says why they cannot be written.

A file is written beside its place under a name of `_PART` and then moved there. While it is written it is locked: what
is not locked was left by a process that was killed, and the next write into that folder removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import platformdirs

from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

T = TypeVar("T")
_PART = ".veloxlab-{}.part"
_SEAL, _NO_SEAL = b"sha256:", b"0" * 64  # before a checksum, and where it will be

# places ---------------------------------------------------------------------------------------------------------------


def kept_in(kind: str, folder: str | Path | None = None) -> Path:
    """Give the folder that keeps measurements of a ``kind``: the one named, or of the user's cache."""
    return Path(folder) if folder else platformdirs.user_cache_path("veloxlab") / kind


def make_folder(folder: str | Path) -> Path:
    """Make a folder if need be; raises `InputError` if no file can be written into it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({_reason(error)}): choose another place.") from error
    check_place(folder / "file")
    return folder


def check_place(path: Path) -> None:
    """Raise `InputError` if no file can be written at ``path``: for before work that takes long."""
    with _one_sentence(path):
        if _is_folder(path):
            raise IsADirectoryError
        with _part_in(path.parent):
            pass


# writing --------------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``; as `write_together`."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Replace files by new contents: a reader, or a crash, finds each as it was or as it is to be.

    All are written before the first is replaced, so that a full disk changes none of them.

    Raises
    ------
    InputError : there is no such folder, it is no place for a file, or it cannot be written.
    """
    with ExitStack() as stack:
        parts = {}
        for path, content in contents.items():
            with _one_sentence(path):
                parts[path], file = stack.enter_context(_part_in(path.parent))
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some disks tell only now that they are full
        for path, part in parts.items():
            with _one_sentence(path):
                part.replace(path)
        for folder in {path.parent for path in contents}:
            _remove_leftovers(folder)


@contextmanager
def _part_in(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file of a folder, locked; if it is still there in the end it is removed."""
    while True:
        part = folder / _PART.format(secrets.token_hex(8))
        file = part.open("xb")
        with suppress(OSError):  # a file system without locks: then nothing there counts as left over
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # another process took it for a leftover before it was locked
    try:
        yield part, file
    finally:
        with suppress(OSError):  # it would write again what could not be written, as was told already
            file.close()
        part.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    for part in folder.glob(_PART.format("*")):
        with suppress(OSError), part.open("r+b") as file:  # another's, or in use
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Make of what goes wrong with writing ``path`` an `InputError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if _is_folder(path):
            said = f"{path} is a folder: give the name of a file in it."
        elif not _is_folder(path.parent):
            said = f"There is no folder {path.parent}: make it, or choose another."
        else:
            said = f"{path} cannot be written ({_reason(error)}): choose another place."
        raise InputError(said) from error


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - `Path.is_dir` raises where a folder above may not be read


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)


# keeping what took long -----------------------------------------------------------------------------------------------


def kept(path: Path, load: Callable[[Path], T], make: Callable[[], T], save: Callable[[T, Path], object]) -> T:
    """Give what was kept at ``path``, or what ``make`` gives, and keep it there.

    A file that ``load`` refuses is named in a warning and made again. Where nothing can be written a warning says so,
    and what was made is given all the same.
    """
    if os.path.exists(path):  # noqa: PTH110 - as `_is_folder`
        try:
            return load(path)
        except InputError as error:
            warnings.warn(f"{error} The file is made again now.", stacklevel=3)
    made = make()
    try:
        make_folder(path.parent)
        save(made, path)
    except InputError as error:
        warnings.warn(f"{error} The result is given, and is not kept.", stacklevel=3)
    return made


class Unfinished:
    """What a long run measured so far, in a file from which the same run goes on after it was stopped.

    Parameters
    ----------
    path : of the file; None keeps nothing.
    format : names the kind of run.
    facts : all that the measurements depend on, as JSON holds it.
    """

    def __init__(self, path: Path | None, format: str, facts: Mapping[str, Any]) -> None:  # noqa: A002 - as in the file
        self._path, self._format, self._facts = path, format, dict(facts)

    def read(self) -> Any:  # noqa: ANN401 - any JSON
        """Give what `put` wrote last for the same facts, or None; raises `InputError` for a damaged file."""
        if self._path is None or not os.path.exists(self._path):  # noqa: PTH110 - as `_is_folder`
            return None
        try:
            content = read_sealed(self._path, self._format)
        except (OSError, ValueError) as error:
            raise InputError(
                f"The unfinished run {self._path} cannot be read ({error}): delete it and start again."
            ) from error
        return content["rows"] if content["facts"] == self._facts else None

    def put(self, rows: Any) -> None:  # noqa: ANN401
        """Write what is there now; where it cannot be written the run goes on, and a warning says so once."""
        if self._path is None:
            return
        try:
            if not self._path.exists():
                make_folder(self._path.parent)
            content = {"format": self._format, "facts": self._facts, "rows": rows}
            write_sealed(self._path, content, indent=None)  # ten times as fast, and it is written often
        except InputError as error:
            self._path = None
            warnings.warn(f"{error} The run goes on, and what it measures is not kept until its end.", stacklevel=2)

    def remove(self) -> None:
        """The run is finished."""
        if self._path is not None:
            with suppress(OSError):  # its result counts now, and the file is no hindrance
                self._path.unlink()


# checksums ------------------------------------------------------------------------------------------------------------


def write_sealed(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> None:
    """Write ``content`` as JSON with the checksum of all it says, whole or not at all."""
    write_atomically(path, json.dumps({**content, "sha256": digest(content)}, indent=indent).encode())


def read_sealed(path: Path, format: str) -> dict[str, Any]:  # noqa: A002 - the field's name in the file
    """Read what `write_sealed` wrote under a ``"format"``.

    Raises
    ------
    OSError, ValueError : it is missing, of another format, or not what was written.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("format") != format:
        raise ValueError(f"it is not of the format {format!r}")
    if content.pop("sha256", None) != digest(content):
        raise ValueError("it is not what was written")
    return content


def digest(content: object) -> str:
    """SHA-256 of what JSON can hold, in hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_parquet(path: Path, frame: pl.DataFrame) -> None:
    """Write ``frame`` as Parquet, whole or not at all."""
    held = io.BytesIO()
    frame.write_parquet(held)
    write_atomically(path, held.getvalue())


def write_sealed_parquet(path: Path, frame: pl.DataFrame, format: str, said: object) -> None:  # noqa: A002
    """Write ``frame`` as Parquet, whole or not at all, with ``said`` as JSON and the checksum of the whole file.

    The checksum is in the file's metadata, and is that of the file with zeros in its place.
    """
    held = io.BytesIO()
    frame.write_parquet(held, metadata={format: json.dumps(said), "checksum": (_SEAL + _NO_SEAL).decode()})
    before, behind = _around_seal(held.getvalue())
    write_atomically(path, before + _sum(before, behind) + behind)


def read_sealed_parquet(path: Path, format: str) -> tuple[pl.DataFrame, Any]:  # noqa: A002
    """Read the frame and what was said of it, as `write_sealed_parquet` wrote them.

    Raises
    ------
    OSError, ValueError : it is missing, of another format, or not what was written. Nothing is parsed before that is
        known: of damaged files Polars reads other numbers, or panics.
    """
    import polars as pl

    content = path.read_bytes()
    before, behind = _around_seal(content)
    if before + _sum(before, behind) + behind != content:
        raise ValueError("it has no checksum, or is not what was written")
    metadata = pl.read_parquet_metadata(io.BytesIO(content))
    if format not in metadata:
        raise ValueError(f"it is not of the format {format!r}")
    return pl.read_parquet(content), json.loads(metadata[format])


def _around_seal(content: bytes) -> tuple[bytes, bytes]:
    """What is before a file's checksum, and behind it."""
    start = content.rfind(_SEAL) + len(_SEAL)
    return content[:start], content[start + len(_NO_SEAL) :]


def _sum(before: bytes, behind: bytes) -> bytes:
    return hashlib.sha256(before + _NO_SEAL + behind).hexdigest().encode()
