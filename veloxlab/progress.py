"""How long work tells of its progress and of its rows, and how it is cancelled: callbacks that may raise."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl

log = logging.getLogger(__name__)

Progress: TypeAlias = Callable[[int, int, str], object]
"""Called between steps of long work: steps that are done, steps in all, and what is being done, in a few words.

What it raises stops the work there, with nothing half-kept.
"""

OnRows: TypeAlias = "Callable[[pl.DataFrame, Mapping[str, str]], object]"
"""Called after each cache that was measured, so that nothing measured is lost if the work ends early.

It is given all rows so far, and why each cache that has none, or not all, has none.
"""


def silent(*told: object) -> None:
    """Tell nobody."""


def in_words(error: Exception) -> str:
    """What went wrong, in one line: a sentence as it is, and other errors with their kind."""
    said = str(error).partition("\n")[0]
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def say(done: int, total: int, label: str) -> None:
    """Print the progress to standard error, which keeps standard output free for results."""
    print(f"{done} of {total}: {label}", file=sys.stderr)


@cache
def _say_once(text: str) -> None:
    """Log a text, and print it where a person looks at a terminal: a saved notebook is the same on every machine."""
    log.info(text)
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"veloxlab: {text}", file=sys.stderr)


_heard_by: ContextVar[Callable[[str], object]] = ContextVar("heard_by", default=_say_once)


def notice(text: str) -> None:
    """Tell, in a few words, of a slow step that nobody asked for: to who hears of them in this thread, or once."""
    _heard_by.get()(text)


@contextmanager
def notices_to(listener: Callable[[str], object]) -> Iterator[None]:
    """Let a function hear of what `notice` is called with in this thread; it must not raise."""
    before = _heard_by.set(listener)
    try:
        yield
    finally:
        _heard_by.reset(before)


_end: ContextVar[Callable[[], object] | None] = ContextVar("end", default=None)


def may_end() -> None:
    """A place within a long step at which the work may end: raises what `ended_by` was given raises."""
    if (check := _end.get()) is not None:
        check()


def is_endable() -> bool:
    """Whether somebody may want to end the work within its steps."""
    return _end.get() is not None


@contextmanager
def ended_by(check: Callable[[], object] | None) -> Iterator[None]:
    """Let a function that may raise be called within long steps; None for work whose steps have to stay whole."""
    before = _end.set(check)
    try:
        yield
    finally:
        _end.reset(before)
