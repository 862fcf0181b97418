"""veloxlab: a Jupyter laboratory and library for KV-cache compression on MLX.

import veloxlab as vl
model, tokenizer = vl.load("smollm2-135m")
cache = vl.make_cache(model, "turboquant", bits=3)   # for mlx_lm.generate(..., prompt_cache=cache)
vl.Lab(model, tokenizer)
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

from veloxlab.runtime import TOO_LATE, keep_freed_memory, load_fast_blas

if TYPE_CHECKING:
    from veloxlab.allocate.budget import AverageBits, Bounds, BytesPerToken, QualityFloor, TokensInMemory
    from veloxlab.allocate.curves import distortion_curves
    from veloxlab.allocate.ratequant import allocate_bits, rate_budget
    from veloxlab.allocate.rates import RateBudget
    from veloxlab.allocate.search.result import SearchResult, search
    from veloxlab.allocate.sensitivity import sensitivities
    from veloxlab.cache.calibration import Calibration
    from veloxlab.cache.load import load_cache
    from veloxlab.cache.make import make_cache
    from veloxlab.cache.plan import Plan
    from veloxlab.checkup import doctor
    from veloxlab.codecs import methods, register, unregister
    from veloxlab.errors import InputError
    from veloxlab.measure import (
        code_bits,
        fidelity,
        judge,
        largest_contexts,
        layer_errors,
        memory_growth,
        passkey,
        plan_memory,
        predicted_growth,
        reference,
        relative_errors,
        report,
        side_by_side,
        token_errors,
    )
    from veloxlab.measure.activations import Capture, capture
    from veloxlab.measure.calibrate import calibrate
    from veloxlab.mlxlm.hooks import detach
    from veloxlab.models.loading import load
    from veloxlab.models.shapes import ModelShape
    from veloxlab.texts import excerpt
    from veloxlab.widgets.lab import Lab
    from veloxlab.widgets.pages.budget import BudgetTuner
    from veloxlab.widgets.pages.cache import CacheExplorer
    from veloxlab.widgets.pages.errors import ErrorExplorer
    from veloxlab.widgets.pages.generation import SideBySide
    from veloxlab.widgets.pages.keys import KeyExplorer
    from veloxlab.widgets.pages.memory import MemoryPlanner

__version__ = "0.1.0"

keep_freed_memory()
# MLX binds to a BLAS when it is imported: every module here that imports it comes after this line
if load_fast_blas() == TOO_LATE:
    warnings.warn(
        "mlx was imported before veloxlab, so matrix products on this CPU are about 30 times slower than need be: "
        "import veloxlab first, before mlx or mlx_lm.",
        stacklevel=2,
    )

_HOME = {
    "BudgetTuner": "widgets.pages.budget",
    "CacheExplorer": "widgets.pages.cache",
    "Calibration": "cache.calibration",
    "ErrorExplorer": "widgets.pages.errors",
    "Capture": "measure",
    "InputError": "errors",
    "KeyExplorer": "widgets.pages.keys",
    "Lab": "widgets.lab",
    "Plan": "cache.plan",
    "sensitivities": "allocate.sensitivity",
    "calibrate": "measure.calibrate",
    "capture": "measure",
    "code_bits": "measure",
    "detach": "mlxlm.hooks",
    "doctor": "checkup",
    "excerpt": "texts",
    "fidelity": "measure",
    "largest_contexts": "measure",
    "layer_errors": "measure",
    "load": "models.loading",
    "load_cache": "cache.load",
    "make_cache": "cache.make",
    "memory_growth": "measure",
    "methods": "codecs",
    "MemoryPlanner": "widgets.pages.memory",
    "ModelShape": "models.shapes",
    "SideBySide": "widgets.pages.generation",
    "passkey": "measure",
    "plan_memory": "measure",
    "side_by_side": "measure",
    "predicted_growth": "measure",
    "register": "codecs",
    "relative_errors": "measure",
    "report": "measure",
    "token_errors": "measure",
    "unregister": "codecs",
    "judge": "measure",
    "reference": "measure",
    "AverageBits": "allocate.budget",
    "Bounds": "allocate.budget",
    "BytesPerToken": "allocate.budget",
    "QualityFloor": "allocate.budget",
    "RateBudget": "allocate.rates",
    "TokensInMemory": "allocate.budget",
    "allocate_bits": "allocate.ratequant",
    "distortion_curves": "allocate.curves",
    "rate_budget": "allocate.ratequant",
    "SearchResult": "allocate.search.result",
    "search": "allocate.search.result",
}

__all__ = [
    "AverageBits",
    "Bounds",
    "BudgetTuner",
    "BytesPerToken",
    "CacheExplorer",
    "Calibration",
    "Capture",
    "ErrorExplorer",
    "InputError",
    "KeyExplorer",
    "Lab",
    "MemoryPlanner",
    "ModelShape",
    "Plan",
    "QualityFloor",
    "RateBudget",
    "SearchResult",
    "SideBySide",
    "TokensInMemory",
    "allocate_bits",
    "calibrate",
    "capture",
    "code_bits",
    "detach",
    "distortion_curves",
    "doctor",
    "excerpt",
    "fidelity",
    "judge",
    "largest_contexts",
    "layer_errors",
    "load",
    "load_cache",
    "make_cache",
    "memory_growth",
    "methods",
    "passkey",
    "plan_memory",
    "predicted_growth",
    "rate_budget",
    "reference",
    "register",
    "relative_errors",
    "report",
    "search",
    "sensitivities",
    "side_by_side",
    "token_errors",
    "unregister",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: ``import veloxlab`` and the command line stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'veloxlab' has no attribute {name!r}")
    value = getattr(import_module(f"veloxlab.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
