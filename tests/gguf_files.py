"""Writes small GGUF files for tests with llama.cpp's own package, and mlx-lm's weights as its converter writes them."""

from __future__ import annotations

import struct

import mlx.core as mx
import numpy as np
from gguf import GGUFValueType, GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from mlx.utils import tree_flatten
from tokenizers.pre_tokenizers import ByteLevel

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 4, 2, 8, 24, 96


def write_gguf(path, architecture, tensors, metadata):
    """Write tensors (arrays, or bytes and their type) and metadata (by keys, or by the writer's methods)."""
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if key.startswith("add_"):
            getattr(writer, key)(value)
        elif not (isinstance(value, list) and not value):  # the package cannot write an empty list
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        stored, kind = tensor if isinstance(tensor, tuple) else (np.array(tensor), None)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp(model, architecture, *, permuted=False, norm_plus=0.0):
    """Return mlx-lm's weights with the names, order of rows and norms of llama.cpp's converter."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, len(model.layers))
    heads = {"q_proj": model.args.num_attention_heads, "k_proj": model.args.num_key_value_heads}
    written = {}
    for name, weight in tree_flatten(model.parameters(), destination={}).items():
        module, _, part = name.replace("switch_mlp", "experts").rpartition(".")
        values = np.array(weight.astype(mx.float32))
        if module.endswith("norm"):
            values = values + np.float32(norm_plus)
        if permuted and (count := heads.get(module.rpartition(".")[2])):
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        written[f"{names.get_name(module)}.{part}"] = values
    return written


def tiny_metadata(**changes):
    values = {
        "llama.embedding_length": WIDTH,
        "llama.block_count": 2,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 512,
    }
    return {**values, **changes}


def tiny_tensors(tied=True, vocabulary=VOCAB):
    mx.random.seed(0)
    shapes = {"token_embd": (vocabulary, WIDTH), "output_norm": (WIDTH,)}
    if not tied:
        shapes["output"] = (vocabulary, WIDTH)
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


def write_llama(path, tensors=None, architecture="llama", **metadata):
    """Write a tiny llama model with random weights; ``metadata`` adds to its own values or replaces them."""
    values = {key: value for key, value in tiny_metadata(**metadata).items() if value is not None}
    return write_gguf(path, architecture, tiny_tensors() if tensors is None else tensors, values)


def byte_level(tokens, merges, types, **ids):
    """Return metadata of a byte-level vocabulary, with ids of named tokens."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()},
    }


def write_chat_model(path):
    """Write a complete chat model of 512 positions: a token for each byte, `<end>`, and a template."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<end>"]
    vocabulary = byte_level(tokens, ["a b"], [1] * (len(tokens) - 1) + [3], eos=len(tokens) - 1)
    vocabulary["tokenizer.chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    return write_llama(path, tiny_tensors(vocabulary=len(tokens)), **vocabulary)


def write_tensor(path, kind, shape, data, copies=1):
    """Write a GGUF file with a tensor ``x.weight`` of the format number ``kind``, by hand."""
    dims = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    said = struct.pack("<Q", 8) + b"x.weight" + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, copies, 0) + said * copies
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path
