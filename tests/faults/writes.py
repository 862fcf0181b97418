"""Faults while a file is written: places that cannot be written, full disks, two writers, and processes that die."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.damage import REFUSED, Fault, outcome, thing
from tests.faults.kinds import KINDS, Kind

KEPT, IN_TIME = "refused, the older file kept", "whole"
DURING = "whole after a death during the write"
GOOD = {KEPT, IN_TIME, DURING}
NOBODY = 65534  # a user without rights
LONGEST_WAIT = 0.05  # seconds until a writer is killed


@contextmanager
def most_bytes(limit: int) -> Iterator[None]:
    """No file can become longer, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """No file can be written into a folder, not even by root, who becomes another user meanwhile."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def _refused(kind: Kind, path: Path, saved: str) -> str:
    """Return `KEPT` if a write was refused and the older file is unchanged."""
    others = sorted(other.name for other in path.parent.iterdir() if other != path)
    if saved != REFUSED:
        return saved
    return f"there is litter: {others}" if others else KEPT


def onto_a_folder(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """A folder has the name."""
    made = kind.load(path)
    path.unlink()
    path.mkdir()
    yield _refused(kind, path, outcome(lambda: kind.save(made, path), path.name))
    assert not list(path.iterdir())


def into_a_read_only_folder(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The folder is not writable."""
    before, new = path.read_bytes(), thing(_name(kind), 1)
    with read_only(path.parent):
        said = outcome(lambda: kind.save(new, path), path.name)
    yield _refused(kind, path, said) if path.read_bytes() == before else "the older file is another"


def without_space(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The disk is full after a number of bytes."""
    before, new = path.read_bytes(), thing(_name(kind), 1)
    kind.save(new, path)
    size = path.stat().st_size
    for step in range(amount):
        path.write_bytes(before)
        with most_bytes(step * (size - 1) // max(1, amount - 1)):
            said = outcome(lambda: kind.save(new, path), path.name)
        yield _refused(kind, path, said) if path.read_bytes() == before else "the older file is another"


def two_writers(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """Two processes write the file repeatedly while this one reads it."""
    wholes = _sources(kind, path.parent.parent)
    writers = [_start(kind, [source], path, amount) for source in wholes]
    for _, ready in writers:
        ready.recv()
    while any(writer.is_alive() for writer, _ in writers):
        yield _one_of(kind, path, wholes.values())
    for writer, _ in writers:
        writer.join()
        if writer.exitcode:
            yield f"a writer ended with {writer.exitcode}"
    found = _one_of(kind, path, wholes.values())
    yield _without_litter(path, found)


def killed(kind: Kind, path: Path, rng: random.Random, amount: int) -> Iterator[str]:
    """The process that writes the file is killed at a random moment."""
    wholes = _sources(kind, path.parent.parent)
    for _ in range(amount):
        writer, ready = _start(kind, [*wholes], path)
        ready.recv()
        time.sleep(rng.uniform(0, LONGEST_WAIT))
        writer.kill()
        writer.join()
        found = _one_of(kind, path, wholes.values())
        during = len(list(path.parent.iterdir())) > 1
        kind.save(thing(_name(kind), 0), path)  # the next write removes leftovers
        found = _without_litter(path, found)
        yield DURING if found == IN_TIME and during else found


def _name(kind: Kind) -> str:
    return next(name for name, one in KINDS.items() if one is kind)


def _one_of(kind: Kind, path: Path, wholes: Collection[str]) -> str:
    found = outcome(lambda: kind.tell(kind.load(path)) in wholes, expected=True)
    return IN_TIME if found == "read as written" else f"not whole: {found}"


def _without_litter(path: Path, found: str) -> str:
    others = sorted(other.name for other in path.parent.iterdir() if other != path)
    return f"there is litter: {others}" if others else found


def _sources(kind: Kind, folder: Path) -> dict[Path, str]:
    """Return files of both things, which another process can read, with their checksums."""
    paths = {folder / f"{number}{kind.suffix}": thing(_name(kind), number) for number in (0, 1)}
    for path, made in paths.items():
        kind.save(made, path)
    return {path: kind.tell(kind.load(path)) for path in paths}


def _start(kind: Kind, sources: list[Path], path: Path, times: int | None = None) -> tuple[BaseProcess, Connection]:
    """Start a process that writes the contents of ``sources``; return it, and a pipe that reports its start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.writes"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_write, args=(_name(kind), sources, path, times, there), daemon=True)
    process.start()
    return process, here


def _write(name: str, sources: list[Path], path: Path, times: int | None, ready: Connection) -> None:
    kind = KINDS[name]
    things = [kind.load(source) for source in sources]
    kind.save(things[0], path)
    ready.send(True)
    done = 0
    while times is None or done < times:
        kind.save(things[done % len(things)], path)
        done += 1


WRITES: dict[str, Fault] = {
    "written onto a folder": onto_a_folder,
    "written into a read-only folder": into_a_read_only_folder,
    "no space left": without_space,
    "two writers and a reader": two_writers,
    "killed (`kill -9`) while it is written": killed,
}
