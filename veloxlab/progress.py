"""Callbacks of long work: for its progress, its rows, and its cancellation. They may raise."""

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
"""Called between steps of long work, with the steps that are done, all steps, and the current step in a few words.

An exception from it stops the work there, and leaves no incomplete result.
"""

OnRows: TypeAlias = "Callable[[pl.DataFrame, Mapping[str, str]], object]"
"""Called after each measured cache, so that no measurement is lost if the work ends early.

Its arguments are all rows so far, and the reason for each cache without rows, or without all rows.
"""


def silent(*told: object) -> None:
    """Do nothing."""


def in_words(error: Exception) -> str:
    """Return an error in one line: a complete sentence unchanged, any other error with its class."""
    said = str(error).partition("\n")[0]
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"


def say(done: int, total: int, label: str) -> None:
    """Print the progress to standard error, which keeps standard output free for results."""
    print(f"{done} of {total}: {label}", file=sys.stderr)


@cache
def _say_once(text: str) -> None:
    """Log a text, and print it in a terminal only, so that a saved notebook is the same on every machine."""
    log.info(text)
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"veloxlab: {text}", file=sys.stderr)


_heard_by: ContextVar[Callable[[str], object]] = ContextVar("heard_by", default=_say_once)


def notice(text: str) -> None:
    """Report, in a few words, a slow step that the user did not start: to this thread's listeners, or once."""
    _heard_by.get()(text)


@contextmanager
def notices_to(listener: Callable[[str], object]) -> Iterator[None]:
    """Call a function with each text of `notice` in this thread; it must not raise."""
    before = _heard_by.set(listener)
    try:
        yield
    finally:
        _heard_by.reset(before)


_end: ContextVar[Callable[[], object] | None] = ContextVar("end", default=None)


def may_end() -> None:
    """Let the work end within a long step: call the function given to `ended_by`, which may raise."""
    if (check := _end.get()) is not None:
        check()


def is_endable() -> bool:
    """Whether the work may be ended within its steps."""
    return _end.get() is not None


@contextmanager
def ended_by(check: Callable[[], object] | None) -> Iterator[None]:
    """Set a function that is called within long steps and may raise; None if the steps must not be interrupted."""
    before = _end.set(check)
    try:
        yield
    finally:
        _end.reset(before)
