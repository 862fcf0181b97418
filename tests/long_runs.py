"""Long runs of compressed caches: ``python -m tests.long_runs [NAME ...]`` writes ``data/results/long_runs.md``.

Decoding of many tokens: live bytes beside the bytes that the cache reports, and whether memory grows with steps.
Random schedules (chunks, trims, batches that sequences join and leave, files, copies): logits beside those of the model
without a cache, or, for codes, beside those of the same chunks and trims alone. Rows are written to
``data/results/long_runs.json`` one by one. With names, only those are measured.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import numpy as np

from tests.tiny_models import tiny
from veloxlab.cache.counts import BLOCK
from veloxlab.cli.tables import markdown
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "long_runs.json"
STEPS, EVERY = 20_000, 500  # decoded tokens, and tokens between two readings of memory
SCHEDULES, FEW, ACTIONS = 500, 20, 12  # in all, between two writes of results, and actions of each
LONGEST = 160  # tokens of a sequence
SOME_EXACT: dict[str, Any] = {"sinks": 2, "window": 8}
FAMILIES = {"llama": "plain", "gemma3_text": "sliding windows", "falcon_h1": "hybrid", "qwen3_next": "hybrid"}
BOUNDED = 256  # tokens of a cache that drops old ones
DECODED: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # family, sequences, steps, settings
    "decode, plain": ("llama", 1, STEPS, {}),
    f"decode, at most {BOUNDED} tokens": ("llama", 1, STEPS, {"max_kv_size": BOUNDED}),
    "decode, sliding windows": ("gemma3_text", 1, STEPS, {}),
    "decode, hybrid": ("falcon_h1", 1, STEPS, {}),
    "decode, batch of 16": ("llama", 16, STEPS, {}),
}
CHECKED = {"schedules, exact": ("none", 16), "schedules, codes": ("turboquant", 4)}
Row = dict[str, Any]


# decoding -------------------------------------------------------------------------------------------------------------


def decoded(family: str, sequences: int, steps: int, settings: dict[str, Any], every: int = EVERY) -> Row:
    """Decode random tokens, and read the memory between them.

    MLX can use a free block that is up to two pages larger for a buffer. Which blocks are free depends on the
    timing of its threads. So its cache is switched off, except for the last steps.
    """
    usual = mx.set_cache_limit(0)
    mx.clear_cache()
    try:
        return _decoded(family, sequences, steps, settings, every, usual)
    finally:
        mx.set_cache_limit(usual)


def _decoded(family: str, sequences: int, steps: int, settings: dict[str, Any], every: int, usual: int) -> Row:
    model, rng = tiny(family), np.random.default_rng(0)
    _steps(model, _filled(model, sequences, rng, settings), 2 * BLOCK, rng, sequences)  # builds what all caches share
    gc.collect()
    before = mx.get_active_memory()
    cache = _filled(model, sequences, rng, settings)
    looks = []
    for step in range(every, steps + 1, every):
        _steps(model, cache, every, rng, sequences)
        looks.append((step, *_memory(cache, before)))
        print(f"{family} x {sequences}: step, live, held, resident {looks[-1]}", flush=True)
    mx.set_cache_limit(usual)
    _steps(model, cache, every, rng, sequences)
    reused, of_them, _ = _memory(cache, before)
    at, live, held, resident = (np.array(column, np.float64) for column in zip(*looks, strict=True))
    late = at > steps / 2  # one-time setup is done by then
    return {
        "family": family,
        "sequences": sequences,
        "steps": steps,
        "live_bytes": live[-1],
        "held_bytes": held[-1],
        "live_beyond": float(live[-1] / held[-1] - 1),
        "reused_beyond": reused / of_them - 1,
        "live_slope": float(np.polyfit(at[late], (live - held)[late], 1)[0]),
        "resident_slope": float(np.polyfit(at[late], (resident - held)[late], 1)[0]),
    }


def _steps(model: Any, cache: list[Any], count: int, rng: np.random.Generator, sequences: int = 1) -> None:
    for _ in range(count):
        mx.eval(model(mx.array(rng.integers(1, 90, (sequences, 1)).tolist()), cache=cache))


def _filled(model: Any, sequences: int, rng: np.random.Generator, settings: dict[str, Any]) -> list[Any]:
    single = [vl.make_cache(model, **settings) for _ in range(sequences)]
    for caches in single:
        model(mx.array([rng.integers(1, 90, 80).tolist()]), cache=caches)
    mx.eval([layer.state for caches in single for layer in caches])
    return single[0] if sequences == 1 else joined(single)


def _memory(cache: list[Any], before: int) -> tuple[int, int, int]:
    """Return bytes of live arrays beyond ``before``, bytes that the cache reports, and memory of this process.

    Free memory is returned to the system first, because buffers that grow by copies leave holes.
    """
    mx.eval([layer.state for layer in cache])
    mx.synchronize()
    mx.clear_cache()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return mx.get_active_memory() - before, sum(layer.nbytes for layer in cache), resident


def joined(single: list[list[Any]]) -> list[Any]:
    """Return the cache of a batch from caches of sequences."""
    return [type(layer[0]).merge(list(layer)) for layer in zip(*single, strict=True)]


# schedules ------------------------------------------------------------------------------------------------------------


@dataclass
class Sequence:
    """Tokens that were read, and the cache that read them."""

    cache: list[Any]
    ids: list[int] = field(default_factory=list)


class Schedule:
    """Random actions on some sequences; the logits of each step are compared with a reference."""

    def __init__(self, family: str, method: str, bits: int, seed: int) -> None:
        self.model, self.random, self.coded = model_of(family), random.Random(seed), method != "none"
        self.make = lambda: vl.make_cache(self.model, method, bits=bits, **SOME_EXACT)
        self.sequences = [Sequence(self.make()) for _ in range(3)]
        self.alone = [self.make() for _ in self.sequences]  # for codes: only the same chunks and trims
        self.worst, self.done = 0.0, Counter[str]()

    def run(self, actions: int = ACTIONS) -> None:
        """Do ``actions`` actions, after one chunk of each sequence."""
        for i in range(len(self.sequences)):
            self.chunk(i)
        for _ in range(actions):
            action = self.random.choice([self.chunk, self.trim, self.batch, self.file, self.copy])
            action(self.random.randrange(len(self.sequences)))
            self.done[action.__name__] += 1

    def compare(self, i: int, logits: mx.array) -> None:
        """Keep the largest difference of sequence ``i``'s last logits from the reference, over the largest logit."""
        one, count = self.sequences[i], logits.shape[0]
        if self.coded:
            expected = self.model(mx.array([one.ids[-count:]]), cache=self.alone[i])[0]
        else:
            expected = self.model(mx.array([one.ids]))[0, -count:]
        said, wanted = (np.array(x.astype(mx.float32)) for x in (logits, expected))
        self.worst = max(self.worst, float(np.abs(said - wanted).max() / np.abs(wanted).max()))

    def chunk(self, i: int) -> None:
        """Read an odd number of tokens."""
        one = self.sequences[i]
        count = min(self.random.randint(1, 41), LONGEST - len(one.ids))
        if count > 0:
            new = [self.random.randrange(1, 90) for _ in range(count)]
            one.ids += new
            self.compare(i, self.model(mx.array([new]), cache=one.cache)[0])

    def trim(self, i: int) -> None:
        """Drop some of the newest tokens, if all layers can."""
        one = self.sequences[i]
        most = min(len(one.ids) - 1, 30)
        if most > 0 and all(layer.is_trimmable() for layer in one.cache):
            count = self.random.randint(1, most)
            for layers in (one.cache, *([self.alone[i]] if self.coded else [])):
                assert {layer.trim(count) for layer in layers} == {count}
            del one.ids[-count:]

    def batch(self, _: int) -> None:
        """All sequences join a batch, decode some tokens together, and leave it."""
        together = joined([one.cache for one in self.sequences])
        for _ in range(self.random.randint(1, 4)):
            for one in self.sequences:
                one.ids.append(self.random.randrange(1, 90))
            logits = self.model(mx.array([[one.ids[-1]] for one in self.sequences]), cache=together)
            for i in range(len(self.sequences)):
                self.compare(i, logits[i])
        for i, one in enumerate(self.sequences):
            one.cache = [layer.extract(i) for layer in together]

    def file(self, i: int) -> None:
        """Save the cache, and load it again."""
        with TemporaryDirectory() as folder:
            path = vl.save_cache(Path(folder) / "cache", self.sequences[i].cache)
            self.sequences[i].cache = vl.load_cache(path, self.model)

    def copy(self, i: int) -> None:
        """Replace the cache by a copy, and change the original."""
        one = self.sequences[i]
        original, one.cache = one.cache, copy.deepcopy(one.cache)
        mx.eval(self.model(mx.array([[1, 2, 3]]), cache=original))


@cache
def model_of(family: str) -> Any:
    """Return a small model of a family."""
    return tiny(family)


def scheduled(method: str, bits: int, before: Row | None = None, count: int = FEW) -> Row:
    """Run ``count`` more schedules than ``before``, of all families in turn."""
    found = before or {"schedules": 0, "actions": {}, "worst": dict.fromkeys(FAMILIES, 0.0)}
    start, worst, done = found["schedules"], {**found["worst"]}, Counter[str](found["actions"])
    for seed in range(start, start + count):
        family = [*FAMILIES][seed % len(FAMILIES)]
        one = Schedule(family, method, bits, seed)
        one.run()
        done += one.done
        worst[family] = max(worst[family], one.worst)
    print(f"{method}: {start + count} schedules, {worst}", flush=True)
    return {"schedules": start + count, "actions": dict(sorted(done.items())), "worst": worst}


# results --------------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Row]) -> str:
    """Return the results as Markdown."""
    runs = [{"name": name.partition(", ")[2], **results[name]} for name in DECODED if name in results]
    of_runs = markdown(
        "cache | model | steps: | live, MB: | held, MB: | beyond: | in used blocks: | slope of live: | "
        "slope of the process:",
        "{name} | {family} | {steps:,} | {live:.2f} | {held:.2f} | {more:+.2f} % | {reused:+.2f} % | "
        "{live_slope:+.2f} | {resident_slope:+.1f}",
        runs,
        live=lambda row: row["live_bytes"] / 1e6,
        held=lambda row: row["held_bytes"] / 1e6,
        more=lambda row: 100 * row["live_beyond"],
        reused=lambda row: 100 * row["reused_beyond"],
    )
    checked = [
        {"what": name.partition(", ")[2], "family": family, "error": error, **results[name]}
        for name in CHECKED
        if name in results
        for family, error in results[name]["worst"].items()
    ]
    of_schedules = markdown(
        "what is held | model | schedules of all models: | actions: | largest difference, of the largest logit:",
        "{what} | {family} | {schedules} | {count:,} | {error:.1e}",
        checked,
        count=lambda row: sum(row["actions"].values()),
    )
    return (
        "Long runs, by `uv run python -m tests.long_runs`, of small models with random weights.\n\n## Decoding\n\n"
        "`live` is what MLX holds for the cache, `held` what the cache says, `beyond` by how much the first is more.\n"
        "MLX may give a buffer a used block of memory that is up to two pages larger: `in used blocks` is `beyond`\n"
        "where it does, as it usually does, and small buffers take more. The other columns are without that. Slopes\n"
        "are of what is beyond `held`, in bytes a step, over the second half of the steps. That of the process is\n"
        "without the holes that buffers leave when they are copied into larger ones.\n\n"
        f"{of_runs}\n\n## Random schedules\n\n{of_schedules}\n"
    )


def main(names: list[str]) -> None:
    """Measure ``names``, or all; schedules continue where they stopped."""
    for name in names or (*CHECKED, *DECODED):
        if name in DECODED:
            _keep(name, decoded(*DECODED[name]))
        while name in CHECKED and _results().get(name, {}).get("schedules", 0) < SCHEDULES:
            _keep(name, scheduled(*CHECKED[name], _results().get(name)))


def _results() -> dict[str, Row]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def _keep(name: str, row: Row) -> None:
    results = _results() | {name: row}
    write_atomically(FILE, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(FILE.with_suffix(".md"), tables(results).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
