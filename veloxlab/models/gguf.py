"""Turns a GGUF file of the llama architecture into mlx-lm's own llama model, and its vocabulary into a tokenizer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from veloxlab.errors import InputError
from veloxlab.models.gguf_file import Gguf

if TYPE_CHECKING:
    from mlx_lm.models.llama import ModelArgs
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers.pre_tokenizers import PreTokenizer

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ATOMIC = {2: True, 3: True, 4: False}  # token types that no text is split across: unknown, control, user-defined
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>")  # of files that do not name them
CONVERTED = "load an mlx-lm conversion of this model instead."


def build_model(file: Gguf, dtype: mx.Dtype) -> nn.Module:
    """Build mlx-lm's llama model from a GGUF file, its weights decoded to ``dtype``; `InputError` for any other."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        said = f"{file.path} has the architecture {architecture!r}"
        raise InputError(f"{said}, and only 'llama' is read from GGUF; {CONVERTED}")
    queries = file.value("llama.attention.head_count", int)
    heads = {"attn_q": queries, "attn_k": file.value("llama.attention.head_count_kv", int, queries)}

    def weight(name: str) -> tuple[str, mx.array]:
        *block, module, kind = name.split(".")  # such as blk.3.attn_q.weight; unknown names pass
        read = file.read(name).astype(dtype)
        if module in heads:  # llama.cpp rotates neighbours, and mlx-lm coordinates i and i + D/2: even rows come first
            read = read.reshape(heads[module], -1, 2, read.shape[-1]).swapaxes(1, 2).reshape(read.shape)
        mx.eval(read)  # at once, so that only one is held in float32
        prefix = f"model.layers.{block[1]}." if len(block) == 2 else ""
        return f"{prefix}{MODULES.get(module, module)}.{kind}", read

    with ThreadPoolExecutor(1) as reader:
        weights = reader.map(weight, file.tensors)
        reader.submit(mx.clear_streams)  # MLX aborts the process if that ends just after a thread that has streams
        # here and not above: the weights are read in the two seconds that importing mlx-lm takes
        from mlx_lm.models.llama import Model

        model: nn.Module = Model(_model_args(file, *heads.values()))
    try:
        model.load_weights(list(weights))
    except ValueError as error:
        raise InputError(
            f"The tensors of {file.path} are not those of a plain llama model ({shorten(str(error), 160)}); {CONVERTED}"
        ) from error
    model.eval()
    # the whole tree and not its parameters alone: RoPE frequencies are no parameters, and an array that is still
    # lazy cannot be evaluated on another thread, where notebook widgets run
    mx.eval(model)
    return model


def _model_args(file: Gguf, heads: int, kv_heads: int) -> ModelArgs:
    from mlx_lm.models.llama import ModelArgs

    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} holds no token embeddings (token_embd.weight); give the file of a whole model.")
    width = file.value("llama.embedding_length", int)
    head_dim = file.value("llama.attention.key_length", int, width // heads)
    scaling = file.value("llama.rope.scaling.type", str, "none")
    if scaling != "none" or file.value("llama.rope.dimension_count", int, head_dim) != head_dim:
        said = f"{file.path} scales its rotary positions ({scaling!r}) or rotates only a part of each head"
        raise InputError(f"{said}, which is not read from GGUF; {CONVERTED}")
    return ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=file.value("llama.block_count", int),
        intermediate_size=file.value("llama.feed_forward_length", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=file.value("llama.attention.layer_norm_rms_epsilon", float),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        max_position_embeddings=file.value("llama.context_length", int),
        rope_theta=file.value("llama.rope.freq_base", float, 10000.0),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def build_tokenizer(file: Gguf) -> TokenizerWrapper:
    """Build mlx-lm's tokenizer from a GGUF file; `InputError` unless it is byte-level BPE whose parts fit."""
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        said = f"{file.path} has a tokenizer of the kind {kind!r}, and only byte-level BPE ('gpt2') is read from GGUF"
        raise InputError(f"{said}; {CONVERTED}")
    words = file.value("tokenizer.ggml.pre", str)
    tokens: list[str] = file.value("tokenizer.ggml.tokens", list)
    types = file.value("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise InputError(f"{file.path} has {len(tokens)} tokens and {len(types)} token types; download it again.")
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges", list)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words == "llama-bpe"))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        raise InputError(f"The merges of {file.path} do not fit its tokens ({error}); download it again.") from None
    tokenizer.pre_tokenizer = word_splitter(words)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, types, strict=True)
    tokenizer.add_tokens([AddedToken(t, special=ATOMIC[k], normalized=False) for t, k in kinds if k in ATOMIC])
    named: dict[str, str] = {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        if (key := f"tokenizer.ggml.{name}_token_id") in file.metadata:
            if not 0 <= (number := file.value(key, int)) < len(tokens):
                said = f"{file.path} names the token {number} as {name}, and has {len(tokens)}"
                raise InputError(f"{said}; download it again.")
            named[name] = tokens[number]
    if file.value("tokenizer.ggml.add_bos_token", bool, words == "llama-bpe"):
        bos = tokens[file.value("tokenizer.ggml.bos_token_id", int)]
        tokenizer.post_processor = processors.TemplateProcessing([bos, "$A"], None, [(bos, vocabulary[bos])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.value("llama.context_length", int),
        bos_token=named.get("bos"),
        eos_token=named.get("eos"),
        unk_token=named.get("unknown"),
        pad_token=named.get("padding"),
    )
    ends = vocabulary.keys() & {named.get("eot"), named.get("eom"), *TURN_ENDS}
    return TokenizerWrapper(fast, BPEStreamingDetokenizer, eos_token_ids={vocabulary[token] for token in ends})


def word_splitter(name: str) -> PreTokenizer:
    """Give the rule that cuts text into words before BPE, by llama.cpp's name for it; `InputError` if it is unknown."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    llama3 = Split(Regex(LLAMA3_WORDS), "isolated")
    before: dict[str, list[Any]] = {"gpt-2": [], "smollm": [Digits(individual_digits=True)], "llama-bpe": [llama3]}
    if name not in before:
        said = f"The tokenizer splits words by the rule {name!r}, which is not known"
        raise InputError(f"{said}; 'smollm', 'gpt-2' and 'llama-bpe' are.")
    return Sequence([*before[name], ByteLevel(add_prefix_space=False, use_regex=name != "llama-bpe")])
