"""A button of the page of advice. Its tooltip says what is fitted first and how long, or why it cannot act."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.widgets.layout import WIDE, button

FIRST = " (calibrates first)"
FIT_TAKES = "20 seconds to 3 minutes"  # for one width of SmolLM2-135M


def fit_said(method: str) -> str:
    """A sentence: how long a fit takes, by times of SmolLM2-135M (`veloxlab.measure.calibrate.calibrate`)."""
    seconds = "about 3 minutes" if find_method(method).planned else f"{FIT_TAKES} at each width"
    return f"This first calibrates {method}, once: {seconds} for SmolLM2-135M, longer for a larger model."


class Act:
    """A button. ``fits`` returns the methods to fit first; it raises `InputError` if the button cannot act."""

    def __init__(
        self, words: str, tip: str, act: Callable[[], object], fits: Callable[[], Iterable[str]] = tuple
    ) -> None:
        self.words, self.tip, self.fits = words, tip, fits
        self.button = button(words, tip, act, width="auto")

    def look(self) -> None:
        """Update the button to the present choice."""
        try:
            fits = sorted(set(self.fits()))
        except InputError as error:
            self.button.disabled, self.button.tooltip, self.button.description = True, str(error), self.words
            self.button.remove_class(WIDE)
            return
        said = " ".join([f"{self.tip}.", *map(fit_said, fits)])
        words = f"{self.words}{FIRST if fits else ''}"
        (self.button.add_class if fits else self.button.remove_class)(WIDE)
        self.button.disabled, self.button.tooltip, self.button.description = False, said, words
