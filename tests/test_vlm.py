"""Language models of mlx-vlm on a compressed cache, text and image prompts.

mlx-vlm is no dependency: it weighs 800 MB with OpenCV, pandas, SciPy and others that no test needs. ``uv run --group
vlm pytest tests/test_vlm.py`` installs it; without it these tests are skipped, as they are in CI.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import veloxlab as vl
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.errors import InputError
from veloxlab.mlxlm.hooks import attach, detach
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import own_cache

base = pytest.importorskip("mlx_vlm.models.base")
gemma3 = pytest.importorskip("mlx_vlm.models.gemma3")
qwen = pytest.importorskip("mlx_vlm.models.qwen2_5_vl")

IMAGE, START = 90, 91  # tokens: a place of an image, and its start
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}
SIDE, PATCH = 32, 8  # pixels of an image and of a patch: 16 patches


def gemma() -> Any:
    text = gemma3.TextConfig(
        model_type="gemma3_text",
        num_hidden_layers=4,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=24,
        sliding_window_pattern=2,
        mm_tokens_per_image=4,
        **TEXT,
    )
    vision = gemma3.VisionConfig("siglip_vision_model", 1, 32, 32, 2, patch_size=PATCH, image_size=SIDE)
    config = gemma3.ModelConfig(text, vision, "gemma3", image_token_index=IMAGE, hidden_size=128)
    return gemma3.Model(config)


def qwen_vl() -> Any:
    scaling = {"type": "mrope", "mrope_section": [4, 6, 6]}
    text = qwen.TextConfig("qwen2_5_vl", num_hidden_layers=2, rope_scaling=scaling, **TEXT)
    vision = qwen.VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        out_hidden_size=128,
        num_heads=2,
        patch_size=PATCH,
        window_size=2 * PATCH,
        spatial_patch_size=PATCH,
        fullatt_block_indexes=[0],
    )
    return qwen.Model(
        qwen.ModelConfig(
            text, vision, "qwen2_5_vl", image_token_id=IMAGE, video_token_id=92, vision_start_token_id=START
        )
    )


def prompt(name: str, image: bool) -> tuple[mx.array, dict[str, Any]]:
    """Token ids, and what the model needs beside them: an image takes 4 tokens in both."""
    ids = [7 * i % 80 + 1 for i in range(40)]
    if not image:
        return mx.array([ids]), {}
    ids[5:10] = [START, *[IMAGE] * 4]
    key, given = mx.random.key(1), mx.array([ids])
    if name == "gemma":
        return given, {"pixel_values": mx.random.normal((1, 3, SIDE, SIDE), key=key), "mask": mx.ones_like(given)}
    pixels = mx.random.normal((16, 3 * 2 * PATCH * PATCH), key=key)
    return given, {"pixel_values": pixels, "image_grid_thw": mx.array([[1, 4, 4]])}


def logits(model: Any, ids: mx.array, beside: dict[str, Any], cache: list[Any]) -> np.ndarray:
    """Of a prompt, as mlx-vlm reads it, and of 20 tokens behind it."""
    language, seen = model.language_model, model.get_input_embeddings(ids, **beside)
    language._rope_deltas = language._position_ids = None
    found = language(
        ids,
        inputs_embeds=seen.inputs_embeds,
        mask=seen.attention_mask_4d,
        cache=cache,
        **({"image_grid_thw": beside["image_grid_thw"]} if "image_grid_thw" in beside else {}),
    ).logits[:, -1:]
    rows = [found, *(language(mx.array([[i + 3]]), cache=cache).logits for i in range(20))]
    return np.array(mx.concatenate(rows, axis=1)[0].astype(mx.float32))


@pytest.fixture(params=["gemma", "qwen"])
def built(request):
    mx.random.seed(0)
    model = gemma() if request.param == "gemma" else qwen_vl()
    mx.eval(model.parameters())
    return SimpleNamespace(name=request.param, model=model, language=model.language_model)


@pytest.mark.parametrize("image", [False, True])
def test_text_and_images_are_read_from_codes(built, image):
    given = prompt(built.name, image)
    native = logits(built.model, *given, own_cache(built.language))
    exact = vl.make_cache(built.language, "none", sinks=2, window=8)
    assert {(type(layer), layer.path) for layer in exact} == {(CompressedKVCache, "codes")}
    same, unit = logits(built.model, *given, exact), native.std()
    assert np.abs(same - native).max() < 1e-4 * unit  # float32, in another order
    coded = logits(built.model, *given, vl.make_cache(built.language, bits=8, sinks=0, window=0, chunk="codes"))
    error, layers = np.sqrt(np.mean((coded - native) ** 2)) / unit, len(exact)
    assert 0 < error < 0.03 * layers  # 0.5 % of a vector in each: of mlx-lm's families two layers stay below 0.06
    assert vl.report(exact)["path"].to_list()[:2] == ["codes"] * 2


def test_a_look_at_the_model_leaves_nothing_in_it(built):
    before, name = dict(built.language), name_of(built.language)
    vl.make_cache(built.language)
    assert dict(built.language).keys() == before.keys()
    logits(built.model, *prompt(built.name, True), own_cache(built.language))
    assert name_of(built.language) == name  # which tells weights, and not the positions of the last text


def test_a_whole_model_that_does_not_run_without_an_image_is_refused():
    with pytest.raises(InputError, match="Give its language_model"):
        vl.make_cache(gemma())


def test_what_is_replaced_is_restored():
    attach()
    ours = base.scaled_dot_product_attention
    assert gemma3.language.scaled_dot_product_attention is ours
    detach()
    try:
        assert gemma3.language.scaled_dot_product_attention is base.scaled_dot_product_attention is not ours
    finally:
        attach()
