"""What a look at keys or values asks, and what measures it. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import polars as pl

from veloxlab.measure import Capture
from veloxlab.measure.distributions import channel_distributions, densities
from veloxlab.measure.errors import Side
from veloxlab.measure.levels import level_densities
from veloxlab.measure.progress import Progress
from veloxlab.measure.rope_pairs import rope_pairs
from veloxlab.measure.spaces import Space
from veloxlab.measure.spectra import spectra
from veloxlab.widgets.fitting import Fitting
from veloxlab.widgets.layer_explorer import Question


@dataclass(frozen=True)
class KeyLook:
    """What is looked at: a layer's keys or values in a space, and a method at a width."""

    layer: int
    tensor: Side
    space: Space
    method: str
    bits: int

    @property
    def questions(self) -> dict[str, Question]:
        """What has to be measured for each chart."""
        return {
            "channels": ("channels", self.layer, self.tensor, self.space),
            "density": ("density", self.layer, self.tensor, self.space),
            "levels": ("levels", self.layer, self.tensor, self.method, self.bits),
            "spectrum": ("spectrum", self.layer, self.tensor),
            "pairs": ("pairs", self.layer),
        }


def _levels(fitting: Fitting, progress: Progress, seen: Capture, tensor: Side, method: str, bits: int) -> pl.DataFrame:
    calibration = fitting.calibration(method, [bits], progress)
    return level_densities(seen, method, bits=bits, tensors=(tensor,), calibration=calibration)


MEASURES: dict[str, Callable[..., pl.DataFrame]] = {
    "channels": lambda _, __, seen, tensor, space: channel_distributions(seen, space, tensors=(tensor,)),
    "density": lambda _, __, seen, tensor, space: densities(seen, space, tensors=(tensor,)),
    "levels": _levels,
    "spectrum": lambda _, __, seen, tensor: spectra(seen, tensors=(tensor,)),
    "pairs": lambda _, __, seen: rope_pairs(seen),
}
