"""Faults of an existing file: each function damages the file, and yields the outcome of each attempt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from tests.faults.kinds import KINDS, Kind
from veloxlab.codecs import METHODS
from veloxlab.errors import InputError

REFUSED, SAME, LEFT_ALONE = "refused", "read as written", "left alone"
GOOD = {REFUSED, SAME, LEFT_ALONE}
STEP = 64  # bytes between two cuts
LONGEST = 500  # characters of a sentence
Fault = Callable[[Kind, Path, random.Random, int], Iterator[str]]


@cache
def thing(kind: str, number: int) -> Any:
    """Return the first or the second thing of a kind."""
    return KINDS[kind].make(number)


@cache
def content(kind: str, number: int = 0) -> bytes:
    """Return the content of a thing's file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{KINDS[kind].suffix}"
        KINDS[kind].save(thing(kind, number), path)
        return path.read_bytes()


def outcome(attempt: Callable[[], Any], name: str = "", expected: object = None) -> str:
    """Return the outcome: `REFUSED` in one sentence that has ``name``, or `SAME` if the result is the expected one."""
    try:
        found = attempt()
    except InputError as error:
        said = str(error)
        one = "\n" not in said and said.endswith(".") and len(said) <= LONGEST and name in said
        return REFUSED if one else f"refused by the words {said!r}"
    except Exception as error:  # noqa: BLE001 - any other is what this looks for
        return f"{type(error).__name__}: {error}"
    if found is None and expected is None:
        return LEFT_ALONE
    return SAME if found == expected else "taken for something else"


def reading(kind: Kind, path: Path, expected: str = "") -> str:
    """Return the outcome of reading a file, whose `Kind.tell` should be ``expected``."""
    return outcome(lambda: kind.tell(kind.load(path)), path.stem, expected)


def some(numbers: Sequence[int], amount: int, rng: random.Random) -> Sequence[int]:
    """Return ``amount`` of the numbers, or all if there are fewer."""
    return numbers if len(numbers) <= amount else sorted(rng.sample(numbers, amount))


def cut(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file ends at some multiple of 64 bytes."""
    whole, expected = path.read_bytes(), kind.tell(kind.load(path))
    for length in some(range(0, len(whole), STEP), amount, rng):
        path.write_bytes(whole[:length])
        yield reading(kind, path, expected)


def flipped(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """One random bit of the file is flipped."""
    whole, expected = path.read_bytes(), kind.tell(kind.load(path))
    for _ in range(amount):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        yield reading(kind, path, expected)


def of_another_kind(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """In its place is a file of each other kind."""
    for name, other in KINDS.items():
        if other is not kind:
            path.write_bytes(content(name))
            yield reading(kind, path)


def of_another_model(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file is used with another model."""
    yield outcome(lambda: kind.elsewhere(path))


def of_another_method(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file is used with another method."""
    if kind.method is not None:
        used = kind.method
        yield outcome(lambda: used(path))


def of_another_version(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file has codes of an older version of their method."""
    if kind.version:
        newer = replace(METHODS[kind.version], version=METHODS[kind.version].version + 1)
        with patch.dict(METHODS, {kind.version: newer}):
            yield reading(kind, path)


def from_the_future(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file is complete, and of a later format."""
    made = kind.load(path)
    with patch.object(kind.module, "FORMAT", f"{kind.module.FORMAT}0"):
        kind.save(made, path)
    yield reading(kind, path)


def empty(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The file has no bytes."""
    path.write_bytes(b"")
    yield reading(kind, path)


def a_folder(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """A folder has the file's name."""
    path.unlink()
    path.mkdir()
    yield reading(kind, path)


def missing(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """There is no file."""
    path.unlink()
    found = reading(kind, path, kind.tell(None) if kind is KINDS["unfinished sweep"] else "")
    yield LEFT_ALONE if found == SAME else found


DAMAGES: dict[str, Fault] = {
    "cut at every 64th byte": cut,
    "a random bit flipped": flipped,
    "of another kind": of_another_kind,
    "of another model": of_another_model,
    "of another method": of_another_method,
    "of another version of its method": of_another_version,
    "of a later format": from_the_future,
    "empty": empty,
    "a folder in its place": a_folder,
    "missing": missing,
}
