"""Which calibration a method has at a width: the one that was given, or one that is made when it is first needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import METHODS, Method, find_method
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.progress import Progress, silent

EXACT = "none"  # the method that compresses nothing


@dataclass
class Fitting:
    """Calibrations of one model, each width of a method fitted when it is first needed, and kept on disk.

    Attributes
    ----------
    model, tokenizer : as `veloxlab.load` gives them; without them nothing can be fitted.
    given : what a person made; its method has its widths and no others.
    """

    model: Module | None = None
    tokenizer: Any = None
    given: Calibration | None = None
    _made: dict[str, Calibration] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """Ids of the methods that can be had, the exact one left out."""
        given = self.given.method if self.given else None
        fits = self.model is not None
        return [m.id for m in METHODS.values() if m.id != EXACT and (fits or not m.calibrated or m.id == given)]

    def widths(self, method: str) -> list[int]:
        """Code bits at which a method can be had."""
        given = self._given(method)
        return list(find_method(method).bits) if given is None else given.widths

    def is_ready(self, method: str, width: int) -> bool:
        """Whether nothing has to be fitted first."""
        return not self._is_fitted_here(find_method(method)) or width in self._widths_made(method)

    def calibration(self, method: str, widths: Iterable[int], progress: Progress = silent) -> Calibration | None:
        """Give what holds a method at these widths, fitted now if need be; None for one that needs nothing.

        Raises
        ------
        InputError : there is nothing to fit it with; as `veloxlab.calibrate`.
        """
        if not self._is_fitted_here(find_method(method)):
            return self._given(method)
        if self.model is None:
            raise InputError(f"{method} has to be fitted first: give calibration=vl.calibrate(model, tokenizer, ...).")
        for width in sorted({*widths} - {*self._widths_made(method)}):
            fitted = calibrate(self.model, self.tokenizer, method, bits=width, progress=progress)
            self._made[method] = self._made[method].joined(fitted) if method in self._made else fitted
        return self._made[method]

    def _given(self, method: str) -> Calibration | None:
        return self.given if self.given and self.given.method == method else None

    def _is_fitted_here(self, method: Method) -> bool:
        return method.calibrated and self._given(method.id) is None

    def _widths_made(self, method: str) -> list[int]:
        return self._made[method].widths if method in self._made else []
