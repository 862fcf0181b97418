"""How long work tells of its progress, and how it is cancelled: a callback that may raise."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called between steps of long work; what it raises stops the work there, with nothing half-kept."""

    def __call__(self, done: int, total: int, label: str) -> None:
        """``done`` of ``total`` steps are finished; ``label`` says what is being done, in a few words."""


def silent(done: int, total: int, label: str) -> None:
    """Tell nobody."""
