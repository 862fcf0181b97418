"""Cache of compiled kernels between test runs, by a checksum of all their inputs."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from tests.metal_on_host.text import HEADERS, INCLUDES, PRELUDES


def kept(suffix: str, compiler: str, flags: Sequence[str], text: str, make: Callable[[Path], None]) -> Path:
    """Return the file that ``make`` writes from ``text``, made once for each text, compiler, flags and headers.

    Folders of headers are not in the checksum, so that all checkouts share compiled files.
    ``make`` gets a temporary path. If it raises, nothing is kept.
    """
    made_from = "\0".join([_version(compiler), *(f for f in flags if f not in INCLUDES), _headers(), text])
    path = _folder() / f"{hashlib.sha256(made_from.encode()).hexdigest()}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            make(new)
            new.replace(path)
    return path


@functools.cache
def _folder() -> Path:
    """Return ``VELOXLAB_TEST_CACHE``, or a folder of the user's cache."""
    chosen = os.environ.get("VELOXLAB_TEST_CACHE")
    folder = Path(chosen) if chosen else platformdirs.user_cache_path("veloxlab") / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _headers() -> str:
    """Return a checksum of the files that a kernel's text can include, and of this machine."""
    checksum = hashlib.sha256()
    for path in sorted([*HEADERS.glob("*.h"), *PRELUDES.glob("*.h"), *PRELUDES.glob("*.cpp")]):
        checksum.update(path.name.encode() + path.read_bytes())
    return checksum.hexdigest()
