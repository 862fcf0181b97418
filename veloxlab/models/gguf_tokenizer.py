"""Builds mlx-lm's tokenizer from the vocabulary of a GGUF file: byte-level BPE or SentencePiece, as in llama.cpp."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from veloxlab.errors import InputError
from veloxlab.models.gguf import Gguf

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_END = r"|\s+(?!\S)|\s+"
_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+{_END}"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+{_END}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"(?i:{_SHORT})|{_WORD}|\p{{N}}{{1,3}}{_REST}"
_QWEN2 = rf"(?i:{_SHORT})|{_WORD}|\p{{N}}{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"  # a word ends before a capital letter
_SLASHED = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+{_END}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+{_END}"
)
_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
SPLITTERS: dict[tuple[str, ...], tuple[str, ...]] = {  # by values of `tokenizer.ggml.pre`: patterns to apply in turn
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum", "exaone4", "granite-docling"): (_GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (_DIGIT, _GPT2),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): (_LLAMA3,),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): (_LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "hunyuan", "solar-open", "grok-2"): (_QWEN2,),
    ("tekken",): (_CASED % ("", "") + r"|\p{N}" + _SLASHED,),
    ("gpt-4o", "llama4", "kanana2"): (_CASED % ((f"(?i:{_SHORT})?",) * 2) + r"|\p{N}{1,3}" + _SLASHED,),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): (_THREE_DIGITS, "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3),
    ("deepseek-coder",): (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT),
    ("falcon",): (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    ("default",): (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ("bloom", "poro-chat", "gpt3-finnish"): (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    ("viking",): (r" ?[^(\s|.,!?…。，、।۔،)]+", _DIGIT),
    ("bailingmoe",): (rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]{_END}",),
    ("seed-coder",): (rf"(?i:{_SHORT})|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+{_END}",),
    ("superbpe",): (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
SPACE = "▁"  # SentencePiece's sign for a space
ATOMIC = {2: True, 3: True, 4: False}  # token types that are matched before BPE: unknown, control, user-defined
USER_DEFINED = 4
TURN_ENDS = (  # for files that do not name them
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>"),
    *("<EOT>", "<｜end▁of▁sentence｜>"),
)
ADVICE = "load an mlx-lm conversion of this model instead."


def build_tokenizer(file: Gguf) -> TokenizerWrapper:
    """Build mlx-lm's tokenizer from a GGUF file; `InputError` if its kind is not supported, or its parts do not fit."""
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    kind = file.value("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        said = f"{file.path} has a tokenizer of the kind {kind!r}, which is not read from GGUF (gpt2 and llama are)"
        raise InputError(f"{said}; {ADVICE}")
    tokens, types = _vocabulary(file)
    numbers = {token: number for number, token in enumerate(tokens)}
    named = _named(file, tokens)
    prefix = kind == "llama" and file.value("tokenizer.ggml.add_space_prefix", bool, True)
    try:
        tokenizer = _byte_level(file, numbers) if kind == "gpt2" else _sentencepiece(file, numbers, named, prefix)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        raise InputError(f"The merges of {file.path} do not fit its tokens ({error}); download it again.") from None
    kinds = zip(tokens, types, strict=True)
    tokenizer.add_tokens([AddedToken(t, special=ATOMIC[k], normalized=False) for t, k in kinds if k in ATOMIC])
    tokenizer.post_processor = _around(file, named, numbers)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.value(f"{file.value('general.architecture', str)}.context_length", int),
        bos_token=named.get("bos"),
        eos_token=named.get("eos"),
        unk_token=named.get("unknown"),
        pad_token=named.get("padding"),
    )
    streamed = BPEStreamingDetokenizer if kind == "gpt2" else partial(SPMStreamingDetokenizer, trim_space=prefix)
    ends = numbers.keys() & {named.get("eos"), named.get("eot"), named.get("eom"), *TURN_ENDS}
    return TokenizerWrapper(fast, streamed, eos_token_ids={numbers[token] for token in ends})


def _vocabulary(file: Gguf) -> tuple[list[str], list[int]]:
    """Return tokens and their types; user-defined tokens have ordinary spaces."""
    tokens: list[str] = file.value("tokenizer.ggml.tokens", list)
    types: list[int] = file.value("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise InputError(f"{file.path} has {len(tokens)} tokens and {len(types)} token types; download it again.")
    known = set(tokens)
    if len(known) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise InputError(f"{file.path} has the token {twice!r} twice; download it again.")
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == USER_DEFINED and (typed := token.replace(SPACE, " ")) not in known:
            tokens[number] = typed
    return tokens, types


def _named(file: Gguf, tokens: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        if (key := f"tokenizer.ggml.{name}_token_id") in file.metadata:
            if not 0 <= (number := file.value(key, int)) < len(tokens):
                said = f"{file.path} names the token {number} as {name}, and has {len(tokens)}"
                raise InputError(f"{said}; download it again.")
            named[name] = tokens[number]
    return named


def _around(file: Gguf, named: dict[str, str], numbers: dict[str, int]) -> Any:  # noqa: ANN401
    """Return the tokens before and after a text: those that the file names, or llama.cpp's defaults."""
    from tokenizers import processors

    usual = file.metadata.get("tokenizer.ggml.pre") in LLAMA3 or file.metadata["tokenizer.ggml.model"] == "llama"
    asked = {"bos": usual and "bos" in named, "eos": False}
    for name in asked:
        asked[name] = file.value(f"tokenizer.ggml.add_{name}_token", bool, asked[name])
        if asked[name] and name not in named:
            raise InputError(f"{file.path} adds the token {name} to a text and does not say which; download it again.")
    first, last = ([named[name]] if add else [] for name, add in asked.items())
    special = [(token, numbers[token]) for token in {*first, *last}]
    return processors.TemplateProcessing([*first, "$A", *last], [*first, "$A", *last, "$B:1", *last], special)


def _byte_level(file: Gguf, numbers: dict[str, int]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    words = file.value("tokenizer.ggml.pre", str, "default")
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges", list)]
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, ignore_merges=words in LLAMA3))
    tokenizer.pre_tokenizer = word_splitter(words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_splitter(name: str) -> PreTokenizer:
    """Return the rule that splits text into words before BPE, by llama.cpp's name for it; `InputError` if unknown."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    for names, patterns in SPLITTERS.items():
        if name in names:
            cuts: list[Any] = [Split(Regex(pattern), "isolated") for pattern in patterns]
            return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted(name for names in SPLITTERS for name in names))
    raise InputError(f"The tokenizer splits words by the rule {name!r}, which is not known; {known} are.")


def _sentencepiece(file: Gguf, numbers: dict[str, int], named: dict[str, str], prefix: bool) -> Tokenizer:
    """Return SentencePiece's BPE, in which scores of pieces order the merges of neighbours."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    scores = file.value("tokenizer.ggml.scores", list)
    if len(scores) != len(numbers):
        raise InputError(f"{file.path} has {len(numbers)} tokens and {len(scores)} scores; download it again.")
    pieces = dict(zip(numbers, scores, strict=True))
    merges = generate_merges(numbers, pieces)
    unknown = named.get("unknown")
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)] if prefix else plain)
    return tokenizer
