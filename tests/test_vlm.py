"""Language models of mlx-vlm on a compressed cache, with text and image prompts.

mlx-vlm is not a dependency: it needs 800 MB with OpenCV, pandas, SciPy and others that no test needs. ``uv run --group
vlm pytest tests/test_vlm.py`` installs it; without it these tests are skipped, as they are in CI.
"""

from __future__ import annotations

from functools import partial
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
generate = pytest.importorskip("mlx_vlm.generate")
gemma3 = pytest.importorskip("mlx_vlm.models.gemma3")
qwen = pytest.importorskip("mlx_vlm.models.qwen2_5_vl")
hybrid = pytest.importorskip("mlx_vlm.models.qwen3_5.config")

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


def qwen_hybrid() -> Any:
    """Return a model of which two of four layers keep states."""
    rope = {"type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e5, "partial_rotary_factor": 0.25}
    states = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    states |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4}
    text = hybrid.TextConfig(
        "qwen3_5",
        num_hidden_layers=4,
        max_position_embeddings=512,
        head_dim=64,
        tie_word_embeddings=True,
        full_attention_interval=2,
        rope_parameters=rope,
        **states,
        **TEXT,
    )
    vision = hybrid.VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        out_hidden_size=128,
        num_heads=2,
        patch_size=PATCH,
        num_position_embeddings=16,
        deepstack_visual_indexes=[],
    )
    tokens = {"image_token_id": IMAGE, "video_token_id": 92, "vision_start_token_id": START, "vocab_size": 96}
    return pytest.importorskip("mlx_vlm.models.qwen3_5").Model(hybrid.ModelConfig(text, vision, "qwen3_5", **tokens))


MODELS = {"gemma": gemma, "qwen": qwen_vl, "hybrid": qwen_hybrid}


def prompt(name: str, image: bool) -> tuple[mx.array, dict[str, Any]]:
    """Return token ids and the model's other inputs; an image takes 4 tokens in both."""
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
    """Return logits of a prompt, as mlx-vlm reads it, and of 20 tokens after it."""
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


class Processor:
    """The processor that mlx-vlm's generators need: it writes nothing, and no token ends a text."""

    last_segment = text = ""

    def __init__(self) -> None:
        self.tokenizer = self.detokenizer = self.stopping_criteria = self

    def __call__(self, token: int) -> bool:
        return False

    def add_token(self, token: int, **_: object) -> None: ...

    def add_eos_token_ids(self, ids: object) -> None: ...

    def finalize(self) -> None: ...

    def reset(self) -> None: ...


def streamed(built: Any, ids: mx.array, beside: dict[str, Any], **given: Any) -> tuple[list[int], np.ndarray, int]:
    """Return eight tokens of mlx-vlm's own generation, their predictions, and how many tokens a cache already had."""
    given = {"temperature": 0.0, "max_tokens": 8} | given
    found = [*generate.stream_generate(built.model, Processor(), "", input_ids=ids, **beside, **given)]
    logprobs = np.stack([np.array(one.logprobs) for one in found])
    return found[-1].token_ids, logprobs, found[-1].cached_tokens


def in_batches(built: Any, prompts: list[tuple[mx.array, dict[str, Any]]], at_once: int) -> list[tuple[list[int], Any]]:
    """Return eight tokens of each prompt with its inputs, in mlx-vlm's own batch generator."""
    batch = generate.BatchGenerator(built.language, Processor(), max_tokens=8, prefill_batch_size=at_once)
    given = []
    for ids, beside in prompts:
        seen = built.model.get_input_embeddings(ids, **beside).to_dict()
        grid = {name: x for name, x in beside.items() if name == "image_grid_thw"}
        given.append({name: x for name, x in seen.items() if x is not None} | grid)
    uids = batch.insert([ids[0].tolist() for ids, _ in prompts], prompt_kwargs=given)
    found: dict[int, list[Any]] = {uid: [] for uid in uids}
    while batch.has_work:
        for one in batch.next()[1]:
            found[one.uid].append((one.token, one.token_logprob))
    batch.close()
    return [tuple(map(list, zip(*found[uid], strict=True))) for uid in uids]


@pytest.fixture(params=MODELS)
def built(request):
    mx.random.seed(0)
    model = MODELS[request.param]()
    mx.eval(model.parameters())
    return SimpleNamespace(name=request.param, model=model, language=model.language_model)


@pytest.mark.parametrize("image", [False, True])
def test_text_and_images_are_read_from_codes(built, image):
    given = prompt(built.name, image)
    native = logits(built.model, *given, own_cache(built.language))
    exact = vl.make_cache(built.language, "none", sinks=2, window=8)
    paths = [layer.path for layer in exact if isinstance(layer, CompressedKVCache)]
    assert paths == ["codes"] * (2 if built.name == "hybrid" else len(exact))
    same, unit = logits(built.model, *given, exact), native.std()
    assert np.abs(same - native).max() < 1e-4 * unit  # float32, in another order
    coded = logits(built.model, *given, vl.make_cache(built.language, bits=8, sinks=0, window=0, chunk="codes"))
    error, layers = np.sqrt(np.mean((coded - native) ** 2)) / unit, len(exact)
    assert 0 < error < 0.03 * layers  # 0.5 % of a vector in each: in mlx-lm's families two layers stay below 0.06


def test_a_dry_run_does_not_change_the_model(built):
    before, name = dict(built.language), name_of(built.language)
    vl.make_cache(built.language)
    assert dict(built.language).keys() == before.keys()
    logits(built.model, *prompt(built.name, True), own_cache(built.language))
    assert name_of(built.language) == name  # the name depends on weights, and not on the positions of the last text


@pytest.mark.parametrize("image", [False, True])
def test_mlx_vlms_own_generation_and_files(built, image, tmp_path):
    given = prompt(built.name, image)
    tokens, native, _ = streamed(built, *given)
    same = streamed(built, *given, prompt_cache=vl.make_cache(built.language, "none", sinks=2, window=8))
    assert same[0] == tokens
    assert np.abs(same[1] - native).max() < 1e-4 * native.std()  # float32, in another order
    cache = vl.make_cache(built.language, bits=4, sinks=2, window=8, sliding="exact")  # so that some are mlx-vlm's
    assert np.abs(streamed(built, *given, prompt_cache=cache)[1] - native).max() > 1e-2 * native.std()  # it is coded
    read = vl.load_cache(vl.save_cache(tmp_path / "seen", cache), built.language)
    ahead = [built.language(mx.array([[5, 6]]), cache=some).logits for some in (cache, read)]
    assert mx.array_equal(*ahead)


def test_a_second_turn_continues_the_first(built):
    """mlx-vlm checks how much of the text a cache still has, and drops the part that differs."""
    ids, runs = prompt(built.name, False)[0], []
    for cache in (own_cache(built.language), vl.make_cache(built.language, "none", sinks=2, window=8)):
        state = generate.PromptCacheState()
        tokens, _, _ = streamed(built, ids[:, :9], {}, prompt_cache_state=state, prompt_cache=cache)
        longer = mx.concatenate([ids[:, :9], mx.array([tokens[:5]]), ids[:, 9:12]], axis=1)
        runs.append(streamed(built, longer, {}, prompt_cache_state=state))
    assert runs[1][2] == runs[0][2] == (0 if built.name == "hybrid" else 9 + 5)  # no state can go back
    assert np.abs(runs[1][1] - runs[0][1]).max() < 1e-4 * runs[0][1].std()  # float32, in another order


def test_mlx_vlms_batches_get_what_each_prompt_gets_alone(built):
    """Its generator makes caches by a method of the language model, if there is one."""
    ids = [7 * i % 80 + 1 for i in range(40)]
    prompts = [*((mx.array([ids[:n]]), {}) for n in (33, 12, 21)), prompt(built.name, True)]
    native = in_batches(built, prompts, 4)
    for method, settings in (("none", {}), ("turboquant", {"bits": 4})):
        made = partial(vl.make_cache, built.language, method, sinks=2, window=8, **settings)
        built.language.make_cache = made
        together, alone = in_batches(built, prompts, 4), in_batches(built, prompts, 1)
        for row, single, own in zip(together, alone, native, strict=True):
            assert row[0] == single[0]
            assert np.allclose(row[1], single[1], atol=1e-3)  # float32, in another order
            if method == "none":
                assert row[0] == own[0]
                assert np.allclose(row[1], own[1], atol=1e-3)


def test_llama_4_of_mlx_vlm_sees_its_chunks():
    """It makes the mask of full-attention layers from the first cache, which sees a chunk."""
    llama4 = pytest.importorskip("mlx_vlm.models.llama4")
    sizes = {"num_hidden_layers": 4, "head_dim": 32, "attention_chunk_size": 24, "num_local_experts": 2}
    language = llama4.LanguageModel(llama4.TextConfig("llama4_text", intermediate_size_mlp=64, **sizes, **TEXT))
    ids, runs = mx.arange(60)[None] * 7 % 90, []
    for cache in (own_cache(language), vl.make_cache(language, "none", sinks=2, window=8)):
        starts = [0, 20, 42, *range(43, 53), 58]
        parts = [ids[:, a:b] for a, b in zip(starts, [*starts[1:], 60], strict=True)]
        runs.append(np.array(mx.concatenate([language(part, cache=cache).logits for part in parts], axis=1)))
    assert np.abs(runs[1] - runs[0]).max() < 1e-4 * runs[0].std()  # float32, in another order


def test_a_whole_model_that_does_not_run_without_an_image_is_refused():
    with pytest.raises(InputError, match="Give its language_model"):
        vl.make_cache(gemma())


def test_replaced_functions_are_restored():
    attach()
    ours = base.scaled_dot_product_attention
    assert gemma3.language.scaled_dot_product_attention is ours
    detach()
    try:
        assert gemma3.language.scaled_dot_product_attention is base.scaled_dot_product_attention is not ours
    finally:
        attach()
