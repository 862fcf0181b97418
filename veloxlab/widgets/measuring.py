"""What the laboratory measures of a capture: each width once, at its sinks and window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from veloxlab.calibration import Calibration
from veloxlab.codecs import Method
from veloxlab.measure import Capture, code_bits, layer_errors, memory_growth, token_errors
from veloxlab.widgets.tables import Tables

MEASURED_UPTO = 4096  # tokens to which caches are really filled
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # the order in which widths are measured: those that people try first


class Measuring:
    """Fills `Tables` from a capture's keys and values.

    Attributes
    ----------
    tables : what is measured so far.
    widths : code bits that can be measured: the method's own, or those of the calibration.
    """

    def __init__(self, capture: Capture, method: Method, calibration: Calibration | None) -> None:
        self._capture = capture
        self._given: dict[str, Any] = {"method": method.id, "calibration": calibration}
        self.tables = Tables()
        self.widths = list(method.bits) if calibration is None else calibration.widths

    def order(self, wanted: Iterable[int]) -> list[int]:
        """All widths: those that are wanted now, then those that may be next."""
        first = sorted({*wanted})
        return [*first, *(width for width in LIKELY_WIDTHS if width in self.widths and width not in first)]

    def width(self, width: int, sinks: int, window: int) -> None:
        """Measure one width, but for what is measured already."""
        tables, at = self.tables, (width, sinks, window)
        given: dict[str, Any] = {**self._given, "bits": width}
        exact: dict[str, Any] = {"sinks": sinks, "window": window}
        if width not in tables.tokens:
            tables.tokens[width] = token_errors(self._capture, **given)
            tables.codes[width] = code_bits(self._capture, **given)
        if at not in tables.growth:
            tables.growth[at] = memory_growth(self._capture, **exact, upto=MEASURED_UPTO, **given)
        if at not in tables.attention:
            tables.attention[at] = layer_errors(self._capture, **exact, **given)
