"""veloxlab: a Jupyter laboratory and library for KV-cache compression on MLX.

import veloxlab as vl
model, tokenizer = vl.load("smollm2-135m")
cache = vl.make_cache(model, "turboquant", bits=3)   # for mlx_lm.generate(..., prompt_cache=cache)
vl.Lab(model, tokenizer)

The most common names are here. The others are in `vl.measure`, `vl.allocate`, `vl.views`, `vl.widgets`, `vl.codecs`
and `vl.models`. `veloxlab/__init__.pyi` lists the names at the top; each is imported when it is first used.
"""

from __future__ import annotations

import warnings
from importlib import import_module

import lazy_loader

from veloxlab.offline import forbid_connections
from veloxlab.runtime import TOO_LATE, defer_iri_grammar, keep_freed_memory, load_fast_blas

__version__ = "0.1.0"

forbid_connections()
keep_freed_memory()
defer_iri_grammar()
# MLX binds to a BLAS at its import, so all imports of modules that use MLX come after this line
if load_fast_blas() == TOO_LATE:
    warnings.warn(
        "mlx was imported before veloxlab, so matrix products on this CPU are about 30 times slower than necessary: "
        "import veloxlab first, before mlx or mlx_lm.",
        stacklevel=2,
    )

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_MOVED = {
    "allocate": "AverageBits Bounds BytesPerToken QualityFloor RateBudget SearchResult TokensInMemory allocate_bits "
    "distortion_curves sensitivities",
    "codecs": "unregister",
    "measure": "Capture code_bits judge largest_contexts layer_errors memory_growth passkey plan_memory "
    "predicted_growth reference relative_errors side_by_side token_errors",
    "mlxlm": "detach",
    "models": "ModelShape",
    "texts": "excerpt",
    "widgets": "BudgetTuner CacheExplorer ErrorExplorer KeyExplorer MemoryPlanner SideBySide",
}
_RENAMED = {"judge": "fidelity_to"}


def __getattr__(name: str) -> object:
    """Import and return a public name; a name that version 0.1 had here still works, with a warning."""
    for module, names in _MOVED.items():
        if name in names.split():
            new = _RENAMED.get(name, name)
            warnings.warn(f"vl.{name} is now vl.{module}.{new}.", DeprecationWarning, stacklevel=2)
            return getattr(import_module(f"veloxlab.{module}"), new)
    return _public(name)
