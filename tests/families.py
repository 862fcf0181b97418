"""Checks of a family of models on a compressed cache, with a small model of its own classes and random weights.

Errors of logits are in units of the standard deviation of the model's logits on its own cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, load_prompt_cache, save_prompt_cache

from tests import stand_ins
from tests.tiny_models import stepwise, tiny
from veloxlab.cache.layer import CompressedKVCache
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import in_words

CHUNKS = [20, 33, *[1] * 20, 5, 2]  # a prompt in two parts, decoding, and drafts of several tokens
WHOLE = [53, *CHUNKS[2:]]
IDS = [7 * i % 90 for i in range(sum(CHUNKS))]
SOME_EXACT: dict[str, Any] = {"sinks": 2, "window": 8}  # so that all three runs hold tokens
ALL_CODED: dict[str, Any] = {"sinks": 0, "window": 0, "chunk": "codes"}
PROMPTS, WANTED = [IDS[:7], IDS[5:45], IDS[3:26]], [6, 9, 3]  # of a batch, and tokens to be generated
ROUNDING = 1e-3  # float32 sums in another order, through some layers
PLACES = 7, 41  # positions that `ropes_of` does not use
Found = dict[str, Any]


class Subject:
    """A small model of a family, and its logits on its own caches."""

    def __init__(self, family: str) -> None:
        self.model = tiny(family)
        self.by_stand_in = "its Metal kernels are computed by MLX operations here" if stand_ins.needed(family) else ""
        fill(self.model)

    @cached_property
    def whole(self) -> np.ndarray:
        """Logits of a prompt that is read in one call."""
        return stepwise(self.model, IDS, probe.own_cache(self.model), WHOLE)

    @cached_property
    def chunked(self) -> np.ndarray:
        """The same logits of a prompt in parts."""
        return stepwise(self.model, IDS, probe.own_cache(self.model), CHUNKS)

    def run(self, cache: list[Any], chunks: Sequence[int] = CHUNKS) -> np.ndarray:
        """Return logits on another cache."""
        return stepwise(self.model, IDS, cache, [*chunks])

    def off(self, one: np.ndarray, other: np.ndarray) -> float:
        """Return the largest difference of two logits."""
        return float(np.abs(one - other).max() / self.chunked.std())


def fill(model: Any) -> None:
    """Randomise arrays of zeros or ones that training would change: biases, sinks, weights of norms, bytes."""
    filled = []
    for i, (name, array) in enumerate(tree_flatten(model.parameters())):
        if array.dtype == mx.uint8 and not array.any().item():
            filled.append((name, mx.random.randint(0, 256, array.shape, key=mx.random.key(i)).astype(mx.uint8)))
        level = array.reshape(-1)[0].item() if array.size and mx.issubdtype(array.dtype, mx.floating) else None
        if level in (0.0, 1.0) and (array == level).all().item():
            some = level + 0.1 * mx.random.normal(array.shape, key=mx.random.key(i))
            filled.append((name, some.astype(array.dtype)))
    model.update(tree_unflatten(filled))


# checks: each returns columns of a family's row -----------------------------------------------------------------------


def paths(subject: Subject) -> Found:
    """Return how attention reads each cache, and why."""
    report = vl.report(vl.make_cache(subject.model)).filter(pl.col("layer").is_not_null())
    kept = [f for f in probe.probe(subject.model) if not f.compressible and "for an indexer" not in f.reason]
    return {
        "path": ", ".join(said_once(report["path"].to_list())),
        "reasons": "; ".join([*report["reason"].unique(maintain_order=True), *filter(None, [subject.by_stand_in])]),
        "own_keys": sum(f.native not in ("ArraysCache", "MambaCache") for f in kept),
    }


def exact(subject: Subject) -> Found:
    """Compare ``none`` on a prompt that is read in one call."""
    same = subject.run(vl.make_cache(subject.model, "none", **SOME_EXACT), WHOLE)
    return {"exact_error": subject.off(same, subject.whole)}


def in_chunks(subject: Subject) -> Found:
    """Compare ``none`` on a prompt in parts."""
    same = subject.run(vl.make_cache(subject.model, "none", **SOME_EXACT))
    return {"chunked_error": subject.off(same, subject.chunked)}


def codes(subject: Subject) -> Found:
    """Compare codes that are read with decoded codes, and both with the exact cache; all tokens are in codes."""
    found, model = {}, subject.model
    for name, bits in (("eight", 8), ("four", 4)):
        coded = subject.run(vl.make_cache(model, bits=bits, **ALL_CODED))
        if bits == 8:
            decoded = subject.run(as_arrays(vl.make_cache(model, bits=bits, **ALL_CODED)))
            found["codes_error"] = subject.off(coded, decoded)
        found[f"{name}_bit_error"] = float(np.sqrt(np.mean((coded - subject.chunked) ** 2)) / subject.chunked.std())
    return found


def batch(subject: Subject) -> Found:
    """Compare three prompts of different lengths in a batch with each one alone: tokens and logits."""
    model = subject.model

    def as_alone(made: Callable[[], list[Any]]) -> bool:
        steps = [
            generate_step(mx.array(prompt), model, max_tokens=count, prompt_cache=cache)
            for prompt, count, cache in zip(PROMPTS, WANTED, [made() for _ in PROMPTS], strict=True)
        ]
        tokens = [[token for token, _ in step] for step in steps]
        if generated_together(model, [made() for _ in PROMPTS]) != tokens:
            return False
        rows, apart = ([made() for _ in PROMPTS] for _ in range(2))
        for prompt, *caches in zip(PROMPTS, rows, apart, strict=True):
            for cache in caches:
                model(mx.array([prompt]), cache=cache)
        together = [slots[0].merge(list(slots)) for slots in zip(*rows, strict=True)]
        for step in range(3):
            news = [step + 3, step + 9, step + 17]
            in_batch = np.array(model(mx.array(news)[:, None], cache=together))
            alone = [stepwise(model, [new], cache, [1]) for new, cache in zip(news, apart, strict=True)]
            if subject.off(in_batch, np.stack(alone)) > ROUNDING:
                return False
        return True

    ours, own = partial(vl.make_cache, model, **SOME_EXACT), partial(probe.own_cache, model)
    return {"batch": agreed(lambda: as_alone(ours), lambda: as_alone(own))}


def trim(subject: Subject) -> Found:
    """Read three tokens, drop them, and read others in their place, one by one."""
    model, ours = subject.model, vl.make_cache(subject.model, "none", **SOME_EXACT)
    if not can_trim_prompt_cache(probe.own_cache(model)):
        return {"trim": "mlx-lm: its own cache cannot be trimmed"}

    def same(cache: list[Any]) -> bool:
        stepwise(model, [*IDS[:20], 3, 4, 5], cache, [20, 1, 1, 1])  # before a window is full
        assert {slot.trim(3) for slot in probe.slots_of(cache)} == {3}
        after = stepwise(model, IDS[20:], cache, [1] * len(IDS[20:]))
        return subject.off(after, subject.chunked[20:]) < ROUNDING

    return {"trim": agreed(lambda: same(ours), lambda: same(probe.own_cache(model)))}


def saved(subject: Subject) -> Found:
    """Compare a saved and loaded cache with the original as both continue."""
    model, cache = subject.model, vl.make_cache(subject.model, **SOME_EXACT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompt.safetensors"

        def own() -> None:
            native = probe.own_cache(model)
            stepwise(model, IDS[:40], native, [40])
            save_prompt_cache(str(file), native)
            stepwise(model, IDS[40:], load_prompt_cache(str(file)), [1] * len(IDS[40:]))

        def same() -> bool:
            stepwise(model, IDS[:40], cache, [40])
            save_prompt_cache(str(file), cache)
            both = (cache, vl.load_cache(file, model))
            return np.array_equal(*(stepwise(model, IDS[40:], some, [1] * len(IDS[40:])) for some in both))

        return {"saved": agreed(same, own)}


def rope(subject: Subject) -> Found:
    """Check that the reported rotary embedding maps keys of two positions to those of one."""
    model, said, worst = subject.model, [], 0.0
    keys = []
    for place in PLACES:
        caches = probe.with_caches(model, partial(probe.Probe, offset=place))
        model(mx.array([[5], [6], [8]]), cache=caches)
        keys.append([one.stored_keys for one in probe.probes_of(caches)])
    for found, *two in zip(ropes_of(model, IDS[:20]), *keys, strict=True):
        if found is not None:
            two = [found.inverse(x, place) for x, place in zip(two, PLACES, strict=True)]
        moved = float(mx.linalg.norm(two[1] - two[0]) / mx.linalg.norm(two[0]))
        if found is not None:
            worst, word = max(worst, moved), "known"
        else:
            word = "no turn" if moved < ROUNDING else "not known"
        said.append(word)
    return {"rope": ", ".join(said_once(said)), "rope_error": worst}


def capture(subject: Subject) -> Found:
    """Check whether `vl.capture` sees the queries of each cache."""
    if not probe.probes_of(probe.with_caches(subject.model, probe.Probe)):
        return {"queries": "no keys"}
    layers = vl.capture(subject.model, Letters(), tokens=64).layers
    return {"queries": ", ".join(said_once(["seen" if s.queries is not None else "not seen" for s in layers]))}


def lab(subject: Subject) -> Found:
    """Check that the laboratory opens, and shows its first page without an error."""
    if not probe.probes_of(probe.with_caches(subject.model, probe.Probe)):
        return {"lab": "no keys"}
    shown = vl.Lab(subject.model, Letters(), tokens=64, window=8)
    try:
        in_time = shown.wait(120)
        return {"lab": str(shown.worker.last_error or ("yes" if in_time else "not in two minutes"))}
    finally:
        shown.worker.close()


CHECKS: tuple[Callable[[Subject], Found], ...] = (
    *(paths, exact, in_chunks, codes, batch, trim, saved, rope, capture, lab),
)


# shared functions ----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with one token for each letter."""

    eos_token_ids = frozenset({95})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return numbers that differ from position to position."""
        return [(7 * i * i + ord(letter)) % 90 for i, letter in enumerate(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return a letter for each id."""
        return "".join(chr(32 + i) for i in ids)


def agreed(same: Callable[[], bool], own: Callable[[], object]) -> str:
    """Return ``"yes"``, ``"no"`` or the error; after ``mlx-lm:`` if its own cache differs, or raises, too."""
    said = tried(same)
    if said != "yes" and tried(own) != "yes":
        return f"mlx-lm: {tried(own)}"
    return said


def tried(check: Callable[[], object]) -> str:
    """Return ``"yes"``, ``"no"``, or the error."""
    try:
        return "no" if check() is False else "yes"
    except Exception as error:  # noqa: BLE001 - a family fails in its own way
        return in_words(error)


def generated_together(model: Any, caches: list[Any]) -> list[list[int]]:
    """Return the generated tokens of `PROMPTS` in a batch."""
    generator = BatchGenerator(model, completion_batch_size=3, prefill_batch_size=2)
    uids = generator.insert(PROMPTS, WANTED, caches=caches)
    made: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            made[response.uid].append(response.token)
    generator.close()
    return [made[uid] for uid in uids]


def as_arrays(cache: list[Any]) -> list[Any]:
    """Return the same caches on the path that decodes, as the reference of reading codes."""
    for slot in probe.slots_of(cache):
        if isinstance(slot, CompressedKVCache):
            slot.path = "arrays"
            for name in {"bits", "group_size"} & {*vars(slot)}:
                delattr(slot, name)
    return cache


def said_once(words: list[str]) -> list[str]:
    """``["own", "own", "codes"]`` as ``["2 × own", "codes"]``."""
    runs: list[tuple[str, int]] = []
    for word in words:
        if runs and runs[-1][0] == word:
            runs[-1] = word, runs[-1][1] + 1
        else:
            runs.append((word, 1))
    return [word if count == 1 else f"{count} × {word}" for word, count in runs]
