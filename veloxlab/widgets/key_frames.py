"""What was measured of single layers of a capture, each frame once. No widgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import polars as pl

from veloxlab.calibration import Calibration, calibration_of
from veloxlab.measure import Capture
from veloxlab.measure.distributions import channel_distributions, densities
from veloxlab.measure.errors import Side
from veloxlab.measure.levels import level_densities
from veloxlab.measure.rope_pairs import rope_pairs
from veloxlab.measure.spaces import Space
from veloxlab.measure.spectra import spectra

Question = tuple[object, ...]  # the name of a chart, the layer, and what else its frame depends on


@dataclass(frozen=True)
class Look:
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


@dataclass
class KeyFrames:
    """Frames by question, of all KV heads. They are never changed, so any thread may read them.

    Attributes
    ----------
    capture : whose layers are measured, one at a time.
    calibration : for the method that it was made for.
    frames : what was measured.
    """

    capture: Capture
    calibration: Calibration | None = None
    frames: dict[Question, pl.DataFrame] = field(default_factory=dict)

    def measure(self, question: Question) -> pl.DataFrame:
        """Give the frame of a question, measured if it is asked for the first time; raises what measuring raises."""
        if question not in self.frames:
            chart, layer, *rest = question
            only = replace(self.capture, layers=tuple(c for c in self.capture.layers if c.layer == layer))
            self.frames[question] = self._measures[str(chart)](only, *rest)
        return self.frames[question]

    @property
    def _measures(self) -> dict[str, Callable[..., pl.DataFrame]]:
        return {
            "channels": lambda seen, tensor, space: channel_distributions(seen, space, tensors=(tensor,)),
            "density": lambda seen, tensor, space: densities(seen, space, tensors=(tensor,)),
            "levels": lambda seen, tensor, method, bits: level_densities(
                seen, method, bits=bits, tensors=(tensor,), calibration=calibration_of(method, self.calibration)
            ),
            "spectrum": lambda seen, tensor: spectra(seen, tensors=(tensor,)),
            "pairs": rope_pairs,
        }
