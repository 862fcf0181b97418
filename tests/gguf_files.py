"""Writes small GGUF files for tests: a llama model by MLX's writer, a single tensor of any format by hand."""

from __future__ import annotations

import struct

import mlx.core as mx
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 4, 2, 8, 24, 96


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


def write_llama(path, tensors=None, **metadata):
    """Write a tiny llama model with random weights; ``metadata`` adds to its own values or replaces them."""
    mx.save_gguf(str(path), tiny_tensors() if tensors is None else tensors, tiny_metadata(**metadata))
    return path


def byte_level(tokens, merges, types, **ids):
    """Metadata of a byte-level vocabulary, with the ids of tokens that it names."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": mx.array(types, mx.int32),
        **{f"tokenizer.ggml.{name}_token_id": mx.array(number, mx.uint32) for name, number in ids.items()},
    }


def write_chat_model(path):
    """Write a whole model that can be talked to, of 512 positions: a token for each byte, `<end>`, and a template."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<end>"]
    vocabulary = byte_level(tokens, ["a b"], [1] * (len(tokens) - 1) + [3], eos=len(tokens) - 1)
    vocabulary["tokenizer.chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}"
    return write_llama(path, tiny_tensors(vocabulary=len(tokens)), **vocabulary)


def write_tensor(path, kind, shape, data):
    """Write a GGUF file with one tensor ``x.weight`` of the format number ``kind``, by hand."""
    dims = b"".join(struct.pack("<Q", size) for size in reversed(shape))
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    head += struct.pack("<Q", 8) + b"x.weight" + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, 0)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def random_content(layout, values):
    """Random bytes of ``values`` values; what holds a float is finite."""
    rng = np.random.default_rng(layout.size)
    if layout.items == 1:
        return rng.normal(size=values).astype({4: np.float32, 2: np.float16}[layout.size]).tobytes()
    blocks = rng.integers(0, 256, (values // layout.items, layout.size), np.uint8)
    for start in {"Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}.get(layout.name, [0]):
        blocks[:, start : start + 2] = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.tobytes()
