"""What is measured of a method on a capture: each width once, at its sinks and window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from veloxlab.measure import Capture, code_bits, layer_errors, memory_growth, token_errors
from veloxlab.measure.progress import Progress, silent
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.tables import Tables

MEASURED_UPTO = 4096  # tokens to which caches are really filled
LIKELY_WIDTHS = (2, 3, 4, 5, 6, 8, 1, 7)  # the order in which widths are measured: those that people try first


class Measuring:
    """Fills `Tables` from a capture's keys and values.

    Attributes
    ----------
    method : the method's id.
    tables : what is measured so far.
    widths : code bits that can be measured.
    """

    def __init__(self, capture: Capture, method: str, fitting: Fitting) -> None:
        self._capture, self._fitting = capture, fitting
        self.method, self.widths = method, fitting.widths(method)
        self.tables = Tables()

    def likely(self, wanted: Iterable[int]) -> list[int]:
        """Widths that may be wanted next and need no fitting first."""
        ready = [width for width in self.widths if self._fitting.is_ready(self.method, width)]
        return [width for width in LIKELY_WIDTHS if width in ready and width not in wanted]

    def width(self, width: int, sinks: int, window: int, progress: Progress = silent) -> None:
        """Measure one width, but for what is measured already; what has to be fitted first tells its progress."""
        tables, at = self.tables, (width, sinks, window)
        calibration = self._fitting.calibration(self.method, [width], progress)
        given: dict[str, Any] = {"method": self.method, "calibration": calibration, "bits": width}
        exact: dict[str, Any] = {"sinks": sinks, "window": window}
        if width not in tables.tokens:
            tables.codes[width] = code_bits(self._capture, **given)
            tables.tokens[width] = token_errors(self._capture, **given)  # last: it says that both are there
        if at not in tables.growth:
            tables.growth[at] = memory_growth(self._capture, **exact, upto=MEASURED_UPTO, **given)
        if at not in tables.attention:
            tables.attention[at] = layer_errors(self._capture, **exact, **given)
