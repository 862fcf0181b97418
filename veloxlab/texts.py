"""The text that ships with veloxlab, for calibration and evaluation without a download."""

from __future__ import annotations

from typing import Literal, get_args

from veloxlab.checks import checked, choice
from veloxlab.errors import InputError
from veloxlab.shipped import shipped_folder

Split = Literal["test", "validation"]


@checked(split=choice(*get_args(Split)))
def excerpt(split: Split = "test") -> str:
    """Give the first articles of a split of WikiText-2, about 100,000 characters (25,000 tokens).

    Calibrate on ``"validation"`` and evaluate on ``"test"``, never the other way round.

    Raises
    ------
    InputError
        There is no such split, or the file is not installed.
    """
    path = shipped_folder("data") / f"wikitext2_{split}_excerpt.txt"
    if not path.is_file():
        raise InputError(f"The text {path} is missing; install veloxlab again, or use a clone of it.")
    return path.read_text(encoding="utf-8")
