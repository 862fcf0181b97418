"""Models that pages can plan for: the one that is here, usual sizes, and what a person types."""

from __future__ import annotations

from dataclasses import replace

from veloxlab.models.shapes import ModelShape

GIGABYTE = 1e9
HERE = "this model"

_SIZES = {  # layers, KV heads, head dimension, weights, tokens that it was trained for (0: not stated here)
    "1B, as Llama 3.2": (16, 8, 64, 1_235_814_400, 131_072),
    "3B, as Llama 3.2": (28, 8, 128, 3_212_749_824, 131_072),
    "8B, as Llama 3.1": (32, 8, 128, 8_030_261_248, 131_072),
    "14B, as Qwen 2.5": (48, 8, 128, 14_770_033_664, 0),
    "32B, as Qwen 2.5": (64, 8, 128, 32_763_876_352, 0),
    "70B, as Llama 3.1": (80, 8, 128, 70_553_706_496, 131_072),
}
SIZES = {
    name: replace(
        ModelShape.typed(layers=layers, kv_heads=heads, head_dim=head_dim, name=name),
        parameters=parameters,
        trained_tokens=trained,
    )
    for name, (layers, heads, head_dim, parameters, trained) in _SIZES.items()
}
"""Shapes of models by their usual sizes, for those who have none of them here."""
