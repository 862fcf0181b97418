"""Writing files whole or not at all, and under a seal that tells whether they are what was written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

if TYPE_CHECKING:
    import polars as pl


def kept_in(kind: str, folder: str | Path | None = None) -> Path:
    """Give the folder that keeps measurements of a ``kind``, made if need be: the one named, or of the user's cache."""
    where = Path(folder) if folder else platformdirs.user_cache_path("veloxlab") / kind
    where.mkdir(parents=True, exist_ok=True)
    return where


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: a reader, or a crash, finds the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_parquet(path: Path, frame: pl.DataFrame, metadata: dict[str, str] | None = None) -> None:
    """Write ``frame`` as Parquet, whole or not at all."""
    held = io.BytesIO()
    frame.write_parquet(held, metadata=metadata)
    write_atomically(path, held.getvalue())


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON with the hash of all it says, whole or not at all."""
    write_atomically(path, json.dumps({**content, "sha256": digest(content)}, indent=1).encode())


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
