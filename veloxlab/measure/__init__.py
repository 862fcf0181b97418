"""Measurements: capture, error, memory and quality, all as Polars frames with documented columns."""

from __future__ import annotations

from veloxlab.measure.activations import Capture, LayerCapture, capture
from veloxlab.measure.errors import layer_errors, relative_errors, token_errors
from veloxlab.measure.generation import first_parting, passkey, side_by_side
from veloxlab.measure.memory import code_bits, memory_growth, predicted_growth, report
from veloxlab.measure.planned_memory import largest_contexts, plan_memory
from veloxlab.measure.quality import Reference, fidelity, judge, reference

__all__ = [
    "Capture",
    "LayerCapture",
    "Reference",
    "capture",
    "code_bits",
    "fidelity",
    "first_parting",
    "judge",
    "largest_contexts",
    "layer_errors",
    "memory_growth",
    "passkey",
    "plan_memory",
    "predicted_growth",
    "reference",
    "relative_errors",
    "report",
    "side_by_side",
    "token_errors",
]
