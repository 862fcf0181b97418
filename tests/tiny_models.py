"""Small models of mlx-lm's own classes with random weights."""

from __future__ import annotations

import mlx.core as mx


def tiny(family: str, **config):
    """A small model of mlx-lm's own class with random weights."""
    module = __import__(f"mlx_lm.models.{family}", fromlist=["Model"])
    common = {
        "model_type": family,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 96,
        "head_dim": 64,
    }
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(common | config))
    mx.eval(model.parameters())
    return model
