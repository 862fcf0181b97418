"""Tokenizers of GGUF files: the same tokens as SentencePiece and byte-level BPE, and refused files."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.gguf_files import byte_level, write_llama
from tests.test_models import ODD_TEXTS
from veloxlab.errors import InputError
from veloxlab.models.gguf import open_gguf
from veloxlab.models.gguf_tokenizer import SPLITTERS, build_tokenizer, word_splitter

TEXTS = [*ODD_TEXTS, "the  cat   sat\n\n on\tthe mat", "", " ", "a<think> the </think>  b"]
WORDS = ("the cat sat on the mat while theory and thunder gather in the north of the city " * 3).split()
LEARNT = [" ".join(WORDS[start : start + 9]) for start in range(0, len(WORDS), 3)]


def open_vocabulary(folder, **metadata):
    return open_gguf(write_llama(folder / "tiny.gguf", **metadata))


def streamed(tokenizer, ids):
    detokenizer = tokenizer.detokenizer
    for number in ids:
        detokenizer.add_token(number)
    detokenizer.finalize()
    return detokenizer.text


# SentencePiece


@pytest.fixture(scope="module", params=[True, False], ids=["llama", "gemma"])
def pieces(request):
    """Return SentencePiece as in Llama 2 and Mistral, with a space before a text, or as in Gemma, without."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNT),
        model_writer=trained,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<think>", "</think>"] if request.param else ["<think>", "</think>", "▁▁", "▁▁▁", "\n\n"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()), request.param


def written(processor, prefix, **changes):
    """Return metadata as llama.cpp's converter writes it for SentencePiece: user-defined pieces with spaces."""
    ids = range(processor.vocab_size())
    user_defined = {n for n in ids if processor.id_to_piece(n) in ("<think>", "</think>", "▁▁", "▁▁▁", "\n\n")}

    def kind(n):
        special = {processor.unk_id(): 2, processor.bos_id(): 3, processor.eos_id(): 3}
        return special.get(n, 4 if n in user_defined else 6 if processor.is_byte(n) else 1)

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            processor.id_to_piece(n).replace("▁", " ") if n in user_defined else processor.id_to_piece(n) for n in ids
        ],
        "tokenizer.ggml.scores": [processor.get_score(n) for n in ids],
        "tokenizer.ggml.token_type": [kind(n) for n in ids],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
        **changes,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_gives_the_tokens_of_the_original(tmp_path, pieces, text):
    processor, prefix = pieces
    tokenizer = build_tokenizer(open_vocabulary(tmp_path, **written(processor, prefix)))
    first, *ids = tokenizer.encode(text)
    assert first == processor.bos_id()  # llama.cpp adds it if the file has no setting
    if prefix and "<think>" in text:  # after it, llama.cpp and Llama's own tokenizer start again with a space
        assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["▁a", "<think>", "▁", "▁the"]
    else:
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == text
        if not text.startswith(" "):  # mlx-lm's stream removes every space before the first letter
            assert streamed(tokenizer, ids) == text


def test_sentencepiece_adds_the_tokens_that_the_file_names(tmp_path, pieces):
    said = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    processor, prefix = pieces
    tokenizer = build_tokenizer(open_vocabulary(tmp_path, **written(processor, prefix, **said)))
    assert tokenizer.encode("the cat") == [*processor.encode("the cat"), processor.eos_id()]


def test_scores_that_do_not_fit_are_refused(tmp_path, pieces):
    metadata = written(*pieces, **{"tokenizer.ggml.scores": [0.0, 1.0]})
    with pytest.raises(InputError, match="has 330 tokens and 2 scores; download it again"):
        build_tokenizer(open_vocabulary(tmp_path, **metadata))


# byte-level BPE


@pytest.mark.parametrize("rule", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_gives_the_tokens_of_the_original(tmp_path, rule):
    original = Tokenizer(models.BPE(ignore_merges=rule in ("llama-bpe", "tekken")))
    original.pre_tokenizer = word_splitter(rule)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    original.train_from_iterator(LEARNT, trainer)
    original.save(str(tmp_path / "tokenizer.json"))
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [3] * 3 + [4] * 2 + [1] * (len(tokens) - 5)
    metadata = byte_level(tokens, [" ".join(merge) for merge in model["merges"]], kinds, bos=0, eos=2)
    metadata["tokenizer.ggml.pre"] = rule
    tokenizer = build_tokenizer(open_vocabulary(tmp_path, **metadata))
    for text in TEXTS:
        ids = original.encode(text).ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [0] * (rule in ("llama-bpe", "tekken")) + ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("add", "ids"), [({"bos": True}, [0, 3, 2]), ({"eos": True}, [3, 2, 4]), ({}, [3, 2])])
def test_tokens_around_a_text_are_those_that_the_file_names(tmp_path, add, ids):
    metadata = byte_level(["<s>", "a", "b", "ab", "</s>"], ["a b"], [3, 1, 1, 1, 3], bos=0, eos=4)
    metadata |= {f"tokenizer.ggml.add_{name}_token": value for name, value in add.items()}
    tokenizer = build_tokenizer(open_vocabulary(tmp_path, **metadata))
    assert tokenizer.encode("abb") == ids
    assert tokenizer.encode("abb", add_special_tokens=False) == [3, 2]


LETTERS = ["<", ">", "/", "t", "h", "i", "n", "k", "a", "b", "ab", "Ġ"]
MARKS = {"<think>": 4, "</think>": 4, "a b": 4, "<unk>": 2, "<|end|>": 3}  # and their types


@pytest.fixture
def marked(tmp_path):
    tokens = [*LETTERS, *MARKS]
    kinds = [1] * len(LETTERS) + [*MARKS.values()]
    return build_tokenizer(open_vocabulary(tmp_path, **byte_level(tokens, ["a b"], kinds, eot=len(LETTERS) + 4)))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a<think>b</think>", ["a", "<think>", "b", "</think>"]),
        ("a b<think", ["a b", "<", "t", "h", "i", "n", "k"]),
        ("aba bba b", ["ab", "a b", "b", "a b"]),
        ("<unk>b<|end|>", ["<unk>", "b", "<|end|>"]),
    ],
)
def test_special_tokens_are_never_split_and_are_restored(marked, text, pieces):
    ids = marked.encode(text)
    assert marked.convert_ids_to_tokens(ids) == pieces
    assert marked.decode(ids) == text
    assert streamed(marked, ids) == text


def test_user_defined_tokens_are_text_and_control_tokens_are_not(marked):
    ids = marked.encode("<think>b<|end|>")
    assert marked.decode(ids, skip_special_tokens=True) == "<think>b"


def test_generation_ends_at_every_end_token_of_the_file(tmp_path):
    tokens = ["S", "TOP", "STOP", "TURN", "CALL", "<|eom_id|>", "<end_of_turn>"]
    metadata = byte_level(tokens, ["S TOP"], [1, 1, 3, 3, 3, 3, 3], eos=2, eot=3, eom=4)
    assert build_tokenizer(open_vocabulary(tmp_path, **metadata)).eos_token_ids == {2, 3, 4, 5, 6}


# the split of words

SAMPLE = "I'M xYz 1234\n\n éa..b"


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("smollm", ["I", "'", "M", "ĠxYz", "Ġ", "1", "2", "3", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("gpt-2", ["I", "'", "M", "ĠxYz", "Ġ1234", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("llama-bpe", ["I", "'M", "ĠxYz", "Ġ", "123", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("qwen2", ["I", "'M", "ĠxYz", "Ġ", "1", "2", "3", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("tekken", ["I", "'M", "Ġx", "Yz", "Ġ", "1", "2", "3", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("gpt-4o", ["I'M", "Ġx", "Yz", "Ġ", "123", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("deepseek-v3", ["I", "'M", "ĠxYz", "Ġ", "123", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
        ("deepseek-coder", ["I", "'", "M", "ĠxYz", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "ĠÃ©a", "..", "b"]),
        ("default", ["I", "'", "M", "ĠxYz", "Ġ", "123", "4", "ĊĊ", "ĠÃ©a", "..", "b"]),
    ],
)
def test_words_are_split_by_the_named_rule(rule, words):
    assert [word for word, _ in word_splitter(rule).pre_tokenize_str(SAMPLE)] == words


def test_no_rule_loses_a_character():
    for rule in (name for names in SPLITTERS for name in names):
        cut = word_splitter(rule).pre_tokenize_str(SAMPLE)
        assert [start for _, (start, _) in cut] == [0, *(end for _, (_, end) in cut[:-1])]


def test_unknown_word_rule_is_refused():
    with pytest.raises(InputError, match=r"rule 'runes', which is not known; .*bloom, .*tekken, .*are"):
        word_splitter("runes")


# vocabularies that are refused


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_other_kinds_of_tokenizer_are_named(tmp_path, kind):
    with pytest.raises(InputError, match=f"tokenizer of the kind '{kind}', which is not read"):
        build_tokenizer(open_vocabulary(tmp_path, **{"tokenizer.ggml.model": kind}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eot_token_id": 3}, "names the token 3 as eot, and has 3;"),
        ({"bos_token_id": 9}, "names the token 9 as bos, and has 3;"),
        ({"token_type": [1]}, "has 3 tokens and 1 token types"),
        ({"merges": ["b a"]}, "merges of .* do not fit its tokens .*`ba` out of vocabulary"),
        ({"merges": ["ab"]}, "merges of .* do not fit its tokens"),
        ({"tokens": ["a", "ab", "a"]}, "has the token 'a' twice; download it again"),
        ({"tokens": "a"}, "has no metadata value tokenizer.ggml.tokens of the type list"),
        ({"add_bos_token": True}, "adds the token bos to a text and does not say which"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(tmp_path, change, message):
    metadata = byte_level(["a", "b", "ab"], ["a b"], [1, 1, 1])
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        build_tokenizer(open_vocabulary(tmp_path, **metadata))
