"""GGUF files as mlx-lm's llama models and tokenizers: the order of rows, the split of words, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from tests.gguf_files import HEAD_DIM, VOCAB, byte_level, tiny_tensors, write_llama
from veloxlab.errors import InputError
from veloxlab.models.gguf import build_model, build_tokenizer, word_splitter
from veloxlab.models.gguf_file import open_gguf


def open_llama(folder, tensors=None, **metadata):
    return open_gguf(write_llama(folder / "tiny.gguf", tensors, **metadata))


# the order of query and key rows


def test_undone_permutation_equals_traditional_rope(tmp_path):
    """llama.cpp's rows with neighbours rotated must give the logits of our rows with halves rotated."""
    file = open_llama(tmp_path)
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
    return tree_flatten(model.parameters())


def is_permuted(name):
    return "q_proj" in name or "k_proj" in name


@pytest.mark.parametrize("tied", [True, False])
def test_output_head_is_tied_only_without_its_own_tensor(tmp_path, tied):
    model = build_model(open_llama(tmp_path, tiny_tensors(tied)), mx.float32)
    assert model.args.tie_word_embeddings is tied
    assert ("lm_head" in model) is not tied


def test_weights_have_the_type_asked_for(tmp_path):
    file = open_llama(tmp_path)
    assert {weight.dtype for _, weight in flat(build_model(file, mx.bfloat16))} == {mx.bfloat16}


# models that are refused


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
    file = open_llama(tmp_path, **change)
    with pytest.raises(InputError, match=message):
        build_model(file, mx.float32)


def test_extra_tensors_are_refused(tmp_path):
    tensors = tiny_tensors() | {"rope_freqs.weight": mx.ones(HEAD_DIM // 2)}
    with pytest.raises(InputError, match=r"not those of a plain llama model .*rope_freqs"):
        build_model(open_llama(tmp_path, tensors), mx.float32)


def test_sentencepiece_vocabulary_is_refused(tmp_path):
    file = open_llama(tmp_path, **{"tokenizer.ggml.model": "llama"})
    with pytest.raises(InputError, match="tokenizer of the kind 'llama'"):
        build_tokenizer(file)


# tokenizers of other GGUF files


def test_beginning_of_text_is_added_where_the_file_says_so(tmp_path):
    metadata = byte_level(["<s>", "a", "b", "ab"], ["a b"], [3, 1, 1, 1], bos=0)
    metadata["tokenizer.ggml.add_bos_token"] = mx.array(True)
    tokenizer = build_tokenizer(open_llama(tmp_path, **metadata))
    assert tokenizer.encode("abb") == [0, 3, 2]
    assert tokenizer.encode("abb", add_special_tokens=False) == [3, 2]


LETTERS = ["<", ">", "/", "t", "h", "i", "n", "k", "a", "b", "ab", "Ġ"]
MARKS = {"<think>": 4, "</think>": 4, "a b": 4, "<unk>": 2, "<|end|>": 3}  # and their types


@pytest.fixture
def marked(tmp_path):
    tokens = [*LETTERS, *MARKS]
    kinds = [1] * len(LETTERS) + [*MARKS.values()]
    return build_tokenizer(open_llama(tmp_path, **byte_level(tokens, ["a b"], kinds, eot=len(LETTERS) + 4)))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a<think>b</think>", ["a", "<think>", "b", "</think>"]),
        ("a b<think", ["a b", "<", "t", "h", "i", "n", "k"]),
        ("<unk>b<|end|>", ["<unk>", "b", "<|end|>"]),
    ],
)
def test_tokens_that_are_no_text_are_never_split_and_come_back_as_they_were(marked, text, pieces):
    ids = marked.encode(text)
    assert marked.convert_ids_to_tokens(ids) == pieces
    assert marked.decode(ids) == text
    streamed = marked.detokenizer
    for number in ids:
        streamed.add_token(number)
    streamed.finalize()
    assert streamed.text == text


def test_tokens_that_the_user_defined_are_text_and_control_tokens_are_not(marked):
    ids = marked.encode("<think>b<|end|>")
    assert marked.decode(ids, skip_special_tokens=True) == "<think>b"


def test_generation_ends_at_every_end_that_the_file_names(tmp_path):
    tokens = ["S", "TOP", "STOP", "TURN", "CALL", "<|eom_id|>"]
    metadata = byte_level(tokens, ["S TOP"], [1, 1, 3, 3, 3, 3], eos=2, eot=3, eom=4)
    assert build_tokenizer(open_llama(tmp_path, **metadata)).eos_token_ids == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("merge", "kinds", "ids", "message"),
    [
        ("a b", [1, 1, 1], {"eot": 3}, "names the token 3 as eot, and has 3;"),
        ("a b", [1, 1, 1], {"bos": 9}, "names the token 9 as bos, and has 3;"),
        ("a b", [1], {}, "has 3 tokens and 1 token types"),
        ("b a", [1, 1, 1], {}, "merges of .* do not fit its tokens .*`ba` out of vocabulary"),
        ("ab", [1, 1, 1], {}, "merges of .* do not fit its tokens"),
    ],
)
def test_vocabulary_that_does_not_add_up_is_refused(tmp_path, merge, kinds, ids, message):
    with pytest.raises(InputError, match=message):
        build_tokenizer(open_llama(tmp_path, **byte_level(["a", "b", "ab"], [merge], kinds, **ids)))


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
