"""Traits that read numbers and words as arguments are read: numpy's are taken, others get one sentence."""

from __future__ import annotations

from typing import Any

import traitlets as t

from veloxlab.checks import WORDS, real, whole


class Whole(t.Int):  # type: ignore[type-arg]
    """A whole number."""

    def validate(self, obj: Any, value: Any) -> int:  # noqa: ANN401
        """Give it as Python's; raises `InputError` for anything else."""
        number: int = whole()(str(self.name), value)
        return number


class Real(t.Float):  # type: ignore[type-arg]
    """A finite number."""

    def validate(self, obj: Any, value: Any) -> float:  # noqa: ANN401
        """Give it as Python's; raises `InputError` for anything else."""
        number: float = real()(str(self.name), value)
        return number


class Words(t.Unicode):  # type: ignore[type-arg]
    """A text."""

    def validate(self, obj: Any, value: Any) -> str:  # noqa: ANN401
        """Give it; raises `InputError` for anything else."""
        text: str = WORDS(str(self.name), value)
        return text
