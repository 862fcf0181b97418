"""Small experiments on SmolLM2: ``python -m tests.surprises_results [EXPERIMENT ...]`` adds missing rows.

Each row, one cache on one window of text, is written to ``data/results/surprises.ndjson`` after its measurement. A
stopped run continues. The earlier guesses are in ``surprises_guesses.json``.

All tokens but sinks are seen through codes; there is no window of exact tokens. By default, windows of text have 256
tokens of the WikiText-2 test text, as in `veloxlab search`. The model is float32; its weights come from a file of
4 bits (GGUF Q4_1).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import polars as pl

from tests.cache_types import WIDTHS, registered
from veloxlab.measure.activations import stretches
from veloxlab.measure.quality import Reference, fidelity_to
from veloxlab.mlxlm.probe import own_cache
from veloxlab.mlxlm.quantized import quantized_cache
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "surprises.ndjson"
BIN = 64  # predictions for each mean in `kl_along`
PROMPT, ANSWER, PROMPTS = 128, 64, 20  # tokens and number of the greedy texts
DECODED_FROM = 128  # tokens of a window that are read in one call before the rest is decoded


@dataclass(frozen=True)
class Cache:
    """One setting: a method of ours, ``"mlx-lm"``, or ``"none"`` for the model's own cache."""

    method: str
    key_bits: int
    value_bits: int
    sinks: int = 0
    mode: str = "oneshot"
    weights: str = "own"  # or "4 bit": groups of 64, by `mx.quantize`
    calibration: str = ""  # a text, and how many of its tokens


@dataclass(frozen=True)
class Job:
    cache: Cache
    text: str  # "256" or "2048" tokens for each window, or "greedy"
    part: int  # number of the window


def both(method: str, *widths: int, **settings: Any) -> list[Cache]:
    return [Cache(method, bits, bits, **settings) for bits in widths]


def times(caches: list[Cache], text: str, parts: range) -> list[Job]:
    return [Job(cache, text, part) for part in parts for cache in caches]


PAIR = [
    cache for sinks in (0, 4) for method in ("turboquant", "rabitq") for cache in both(method, 2, 3, 4, sinks=sinks)
]
GREEDY = [*both("turboquant", 2, 3, 4), *both("rabitq", 4), *both("mlx-lm", 4, 8)]
LONG = [*both("turboquant", 3), *both("rabitq", 3), *both("mlx-lm", 4)]
CALIBRATIONS = {
    "spectralquant": ["WikiText 1024", "code 1024", "random 1024", "WikiText 64", "WikiText 256"],
    "vecinfer": ["WikiText 1024", "code 1024", "random 1024", "WikiText 512"],  # it refuses 256 as too few
}


def experiments() -> dict[str, list[Job]]:
    """Return jobs by experiment, in the order in which they run; experiments share rows."""
    sums = [Cache("none", 16, 16, weights="4 bit"), *both("turboquant", 3, 4, weights="4 bit")]
    types = [*both("turboquant", 4), *(Cache(kind, bits, bits) for kind, bits in WIDTHS.items())]
    types += [*both("mlx-lm", 4, 8), *both("rabitq", 4)]
    pairs = sorted(product(range(2, 7), repeat=2), key=lambda pair: abs(pair[0] - pair[1]))
    plane = [Cache("turboquant", keys, values, sinks=4) for keys, values in pairs]  # sinks change the best pair
    usual = [Cache("turboquant", keys, values, sinks=4) for keys, values in ((4, 4), (5, 3))]  # in the same bytes
    learned = [both(method, 3, calibration=read) for method, texts in CALIBRATIONS.items() for read in texts]
    fitted = [*both("turboquant", 2), *both("spectralquant", 2, calibration="WikiText 512")]
    learned += [both("vecinfer", 2, calibration="WikiText 512", sinks=sinks) for sinks in (0, 4)]
    longer = [both("spectralquant", 3, calibration=f"WikiText {tokens}", sinks=4) for tokens in (1024, 256)]
    return {
        "learned": times([replace(one, sinks=sinks) for one in fitted for sinks in (0, 4)], "256", range(3)),
        "budget": times(usual, "256", range(8)),
        "plane": times(plane, "256", range(3)),
        "types": times(types, "256", range(3)),
        "weights": times([*sums, *both("turboquant", 3, 4)], "256", range(3)),
        "sinks": times(PAIR, "256", range(8)),
        "reading": times([*both("turboquant", 2, 3, 4), *both("turboquant", 2, 3, 4, mode="decode")], "256", range(2)),
        "greedy": times(GREEDY, "greedy", range(PROMPTS)),
        "positions": [*times(LONG, "256", range(8)), *times(LONG, "2048", range(1))],
        "longer": [job for caches in longer for job in times(caches, "256", range(3))],
        "calibration": [job for caches in learned for job in times(caches, "256", range(3))],
    }


@cache
def model() -> Any:
    return vl.load("smollm2-135m", dtype="float32")


@cache
def with_weights_of_4_bits() -> Any:
    """Return the model with each matrix quantized and decoded: numbers of 4-bit weights, at the speed of float32."""
    changed, _ = vl.load("smollm2-135m", dtype="float32")
    for module in changed.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight = mx.dequantize(*mx.quantize(module.weight, 64, 4), 64, 4)
    mx.eval(changed)
    return changed


@cache
def greedy_texts() -> list[list[int]]:
    """Return twenty prompts of the test text, each continued by the exact cache's most likely tokens, as one batch."""
    net, tokenizer = model()
    ids = mx.array(stretches(tokenizer, None, PROMPT, PROMPTS))
    state, read, texts = own_cache(net), ids, [ids]
    for _ in range(ANSWER):
        read = net(read, cache=state)[:, -1].argmax(axis=-1, keepdims=True)
        mx.eval(read)
        texts.append(read)
    return cast("list[list[int]]", mx.concatenate(texts, axis=1).tolist())


@cache
def exact(text: str, part: int) -> Reference:
    net, tokenizer = model()
    if text == "greedy":
        return Reference.of(net, [greedy_texts()[part]])
    return Reference.of(net, [stretches(tokenizer, None, int(text), part + 1)[part]])


@cache
def calibration(method: str, bits: int, read: str) -> Any:
    kind, tokens = read.split()
    net, tokenizer = model()
    ids = random.Random(0).choices(range(1000, 40_000), k=2 * int(tokens))
    texts = {"WikiText": lambda: None, "code": lambda: Path(argparse.__file__).read_text()}
    text = texts[kind]() if kind in texts else tokenizer.decode(ids)
    return vl.calibrate(net, tokenizer, method, text, bits=bits, tokens=int(tokens))


def measured(job: Job) -> dict[str, Any]:
    """Return the divergence in nats: its mean, means of 64 predictions, and where a greedy text differs, or null."""
    chosen, wanted, begun = job.cache, exact(job.text, job.part), time.process_time()
    if chosen.weights != "own":
        wanted = replace(wanted, model=with_weights_of_4_bits())
    made: list[Any] = []
    make: Any = own_cache
    if chosen.method == "mlx-lm":
        make = partial(quantized_cache, bits=chosen.key_bits)
    elif chosen.method != "none":
        bits = {"key_bits": chosen.key_bits, "value_bits": chosen.value_bits}
        given = {"sinks": chosen.sinks, "window": 0, "chunk": "codes"}
        if chosen.calibration:
            given["calibration"] = calibration(chosen.method, chosen.key_bits, chosen.calibration)

        def make(net: Any) -> list[Any]:
            made[:] = vl.make_cache(net, chosen.method, **bits, **given)
            return list(made)

    mode: Any = chosen.mode
    frame = fidelity_to(wanted, make, mode=mode, prompt=DECODED_FROM, per_token=True)
    if job.text == "greedy":
        frame = frame.filter(pl.col("position") >= PROMPT - 1)
    along = frame.group_by(pl.col("position") // BIN, maintain_order=True).agg(pl.col("kl").mean())["kl"]
    parted = frame["flip"].arg_max() if job.text == "greedy" and frame["flip"].any() else None
    codecs = [codec for layer in made for codec in (layer.key_codec, layer.value_codec)]
    bits_seen = sum(codec.bits_per_value for codec in codecs) / len(codecs) if codecs else None
    return {
        "kl": frame["kl"].mean(),
        "flips": frame["flip"].mean(),
        "parted": parted,
        "true_bits": bits_seen,
        "first": int(frame["position"][0]),
        "kl_along": [round(value, 6) for value in along],
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def kept() -> dict[Job, dict[str, Any]]:
    """Return the existing rows."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Job(Cache(**row["cache"]), row["text"], row["part"]): row["found"] for row in rows}


def missing(names: list[str], known: dict[Job, dict[str, Any]]) -> list[Job]:
    """Return missing jobs of the named experiments, by window, so that a stopped run leaves pairs."""
    wanted = [job for name, jobs in experiments().items() if name in names or not names for job in jobs]
    return sorted((job for job in dict.fromkeys(wanted) if job not in known), key=lambda job: job.part)


def main(names: list[str]) -> None:
    """Measure the missing rows of the named experiments, or of all."""
    known = kept()
    with registered():
        for job in missing(names, known):
            known[job] = measured(job)
            lines = [json.dumps(asdict(job) | {"found": found}) for job, found in known.items()]
            write_atomically(FILE, ("\n".join(lines) + "\n").encode())
            print(job, known[job]["kl"], known[job]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
