"""What all tests share: the fast BLAS, loaded before MLX is, and the demo model, loaded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from veloxlab import runtime

runtime.load_fast_blas()  # before any test module imports mlx.core

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@pytest.fixture(scope="session")
def smollm2() -> tuple[nn.Module, TokenizerWrapper]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from veloxlab.models.loading import load

    return load("smollm2-135m", dtype="float32")
