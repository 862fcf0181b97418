"""Cache types of llama.cpp and vLLM as methods of veloxlab; within ``with registered():`` their ids are methods.

``python -m tests.cache_types`` measures their errors on SmolLM2's keys and values, beside our methods without a
calibration: means over a layer's heads, in ``data/results/cache_types.parquet``.

Definitions: ``ggml-quants.c`` of llama.cpp for q8_0, q5_1 and q4_0 (blocks of 32); the OCP 8-bit floating point
specification 1.0 for E4M3 and E5M2, with vLLM's usual scale of 1; NVIDIA's NVFP4, E2M1 in blocks of 16 with an E4M3
scale each and none for the tensor. True bits follow from the stored arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import polars as pl

from veloxlab.codecs.base import Code, Codec, check_vectors
from veloxlab.codecs.method import Method
from veloxlab.codecs.parts.packing import Layout, Row, pack, packed, unpack
from veloxlab.codecs.parts.rope import Start
from veloxlab.store import write_parquet
from veloxlab.texts import shipped_folder

BLOCK = 32
WIDTHS = {"q8_0": 8, "q5_1": 5, "q4_0": 4, "fp8_e4m3": 8, "fp8_e5m2": 8, "nvfp4": 4}


def _blocks(x: mx.array) -> mx.array:
    """Reshape ``[..., D]`` to ``[..., D / 32, 32]``, float32."""
    return x.astype(mx.float32).reshape(*x.shape[:-1], -1, BLOCK)


def _safe(step: mx.array) -> mx.array:
    return mx.where(step == 0, 1.0, step)


@dataclass(frozen=True)
class Steps(Codec):
    """Blocks of 32 in equal steps: around zero (q8_0, q4_0), or up from the least number (q5_1)."""

    head_dim: int
    kind: str
    expand_scales = True

    @property
    def bits(self) -> int:
        return WIDTHS[self.kind]

    @property
    def layout(self) -> Layout:
        rows = {"codes": packed(self.head_dim, self.bits), "step": Row(mx.float16, self.head_dim // BLOCK)}
        return rows | ({"least": Row(mx.float16, self.head_dim // BLOCK)} if self.kind == "q5_1" else {})

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        y, top = _blocks(x), 2 ** (self.bits - 1)
        least = y.min(axis=-1, keepdims=True)
        if self.kind == "q8_0":
            step = mx.abs(y).max(axis=-1, keepdims=True) / (top - 1)
            codes = mx.sign(y) * mx.floor(mx.abs(y / _safe(step)) + 0.5) + top
        elif self.kind == "q4_0":  # the number with the largest magnitude is a level
            loudest = mx.take_along_axis(y, mx.argmax(mx.abs(y), axis=-1, keepdims=True), axis=-1)
            step = loudest / -top
            codes = mx.minimum(mx.floor(y / _safe(step) + top + 0.5), 2 * top - 1)
        else:
            step = (y.max(axis=-1, keepdims=True) - least) / (2 * top - 1)
            codes = mx.floor((y - least) / _safe(step) + 0.5)
        arrays = {"codes": pack(codes.reshape(x.shape).astype(mx.uint32), self.bits)}
        arrays["step"] = step[..., 0].astype(mx.float16)
        return Code(arrays | ({"least": least[..., 0].astype(mx.float16)} if self.kind == "q5_1" else {}), start)

    def expand(self, code: Code) -> mx.array:
        levels = _blocks(unpack(code.arrays["codes"], self.bits, self.head_dim))
        step = code.arrays["step"].astype(mx.float32)[..., None]
        if self.kind == "q5_1":
            y = levels * step + code.arrays["least"].astype(mx.float32)[..., None]
        else:
            y = (levels - 2 ** (self.bits - 1)) * step
        return y.reshape(*y.shape[:-2], self.head_dim)


@dataclass(frozen=True)
class Floats8(Codec):
    """Each number as an 8-bit float: E4M3, or E5M2, which is the upper half of a float16, rounded to even."""

    head_dim: int
    kind: str
    expand_scales = True

    @property
    def layout(self) -> Layout:
        return {"codes": Row(mx.uint8, self.head_dim)}

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        if self.kind == "fp8_e4m3":
            return Code({"codes": mx.to_fp8(x.astype(mx.float32))}, start)
        words = x.astype(mx.float16).view(mx.uint16).astype(mx.uint32)
        return Code({"codes": ((words + 0x7F + ((words >> 8) & 1)) >> 8).astype(mx.uint8)}, start)

    def expand(self, code: Code) -> mx.array:
        codes = code.arrays["codes"]
        if self.kind == "fp8_e4m3":
            return mx.from_fp8(codes, mx.float32)
        return (codes.astype(mx.uint16) << 8).view(mx.float16).astype(mx.float32)


@dataclass(frozen=True)
class Nvfp4(Codec):
    """Numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, times an E4M3 scale for each 16."""

    head_dim: int
    kind: str
    expand_scales = True

    @property
    def layout(self) -> Layout:
        return {"codes": packed(self.head_dim, 4), "scale": Row(mx.uint8, self.head_dim // 16)}

    def encode(self, x: mx.array, start: Start = 0) -> Code:
        check_vectors(x, self.head_dim)
        codes, scale = mx.quantize(x.astype(mx.float32), 16, 4, mode="nvfp4")
        return Code({"codes": codes, "scale": scale}, start)

    def expand(self, code: Code) -> mx.array:
        arrays = code.arrays["codes"], code.arrays["scale"]
        return mx.dequantize(*arrays, group_size=16, bits=4, mode="nvfp4").astype(mx.float32)


def codec(kind: str, head_dim: int) -> Codec:
    """Return the codec of a cache type; ``head_dim`` must be a multiple of 32."""
    return (Floats8 if kind.startswith("fp8") else Nvfp4 if kind == "nvfp4" else Steps)(head_dim, kind)


def method(kind: str) -> Method:
    return Method(
        id=kind,
        name=kind,
        paper="none",
        bits=range(WIDTHS[kind], WIDTHS[kind] + 1),
        stored="what the type's definition says",
        build=lambda head_dim, bits, tensor: codec(kind, head_dim),
        codecs=(Steps, Floats8, Nvfp4),
    )


@contextmanager
def registered() -> Iterator[None]:
    """Within this context, all types are methods of veloxlab."""
    for kind in WIDTHS:
        vl.register(method(kind))
    try:
        yield
    finally:
        for kind in WIDTHS:
            vl.codecs.unregister(kind)


OURS = {"turboquant": (3, 4, 5, 8), "rabitq": (4, 8)}


def main() -> None:
    """Measure all types on the first 128 tokens of the test text, after four exact sinks."""
    model, tokenizer = vl.load("smollm2-135m", dtype="float32")
    seen = vl.measure.capture(model, tokenizer, tokens=128)
    head_dim = seen.layers[0].keys.shape[-1]
    wanted = [*WIDTHS.items(), *((method, bits) for method, widths in OURS.items() for bits in widths)]
    frames = []
    with registered():
        for kind, bits in wanted:
            errors = vl.measure.layer_errors(seen, kind, bits=bits, sinks=4)
            means = errors.group_by("layer", "tensor", maintain_order=True).agg(
                pl.col("rel_mse", "output_error").mean()
            )
            true_bits = vl.codecs.find_method(kind).codec(head_dim, bits, "keys").bits_per_value
            name = kind if kind in WIDTHS else f"{kind} {bits} bit"
            frames.append(means.select(pl.lit(name).alias("cache"), pl.lit(true_bits).alias("true_bits"), pl.all()))
            print(name, means.select(pl.col("output_error").mean()).item(), flush=True)
            write_parquet(shipped_folder("data") / "results" / "cache_types.parquet", pl.concat(frames))


if __name__ == "__main__":
    main()
