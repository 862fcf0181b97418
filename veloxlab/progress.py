"""How long work tells of its progress and of its rows, and how it is cancelled: callbacks that may raise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from veloxlab.errors import InputError

if TYPE_CHECKING:
    import polars as pl


class Progress(Protocol):
    """Called between steps of long work; what it raises stops the work there, with nothing half-kept."""

    def __call__(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` steps are finished; ``label`` says what is being done, in a few words."""


def silent(done: int, total: int, label: str) -> None:
    """Tell nobody."""


class OnRows(Protocol):
    """Called after each cache that was measured, so that nothing measured is lost if the work ends early."""

    def __call__(self, rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
        """``rows`` are all so far; ``left_out`` says why each cache that has none, or not all, has none."""


def unseen(rows: pl.DataFrame, left_out: Mapping[str, str]) -> None:
    """Show nobody."""


def in_words(error: Exception) -> str:
    """What went wrong, in one line: a sentence as it is, and other errors with their kind."""
    said = str(error).partition("\n")[0]
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"
