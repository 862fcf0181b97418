"""The commands that measure this device: times of kernels, peak memory and time by length of text."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veloxlab import runtime
from veloxlab.cli import tables
from veloxlab.errors import InputError
from veloxlab.progress import say
from veloxlab.store import check_place, reading, write_atomically

if TYPE_CHECKING:
    import polars as pl

PARTS = ("attention", "methods", "encode", "decode", "read", "batch", "builds", "fit", "host")


def time_kernels(
    file: Path | None,
    tokens: Sequence[int] | None,
    only: Sequence[str] | None,
    caches: Sequence[str] | None,
    busy: bool,
    against: Path | None = None,
) -> None:
    """Time attention, encoding, decoding and reading; write times and device as JSON, as tables, and as a chart.

    If ``only`` is empty, nothing is timed, and the tables and the chart of FILE are written again. With ``against``,
    the results of an earlier run, print the ratios that moved.
    """
    before = _benched(against) if against else None
    facts, parts = _on_cpu(tokens, caches, busy) if runtime.backend() == "cpu" else _on_gpu(tokens)
    unknown = [name for name in only or () if name not in parts]
    if unknown:
        raise InputError(f"This device has no part {unknown[0]!r}: choose from {', '.join(parts)}.")
    if file:
        check_place(file)
    kept = json.loads(file.read_text()) if only is not None and file and file.exists() else {}
    for name in parts if only is None else only:
        start = time.monotonic()
        rows = parts[name]()  # this also tries kernels, and the facts have the outcome
        kept[name] = {"facts": facts() | {"seconds": round(time.monotonic() - start)}, "rows": rows}
        print(f"{name} took {kept[name]['facts']['seconds']} s", flush=True)
        _write_json(file, kept)
    if file and "attention" in kept:
        write_atomically(file.with_suffix(".md"), f"{tables.bench_tables(kept)}\n".encode())
        if find_spec("altair") is None or find_spec("vl_convert") is None:
            print("Altair and vl-convert, which draw the chart, are not installed.", file=sys.stderr)
        else:
            write_atomically(file.with_suffix(".png"), bench_picture(kept))
    if before is not None:
        from veloxlab.measure.bench.against import against as compared

        print(tables.against_table(compared(before, kept)))


def _benched(path: Path) -> dict[str, Any]:
    """The results of an earlier run of the benchmark."""
    with reading("benchmark", path, "give a file that `veloxlab bench --json` wrote"):
        found = json.loads(path.read_text())
        return {part: {"facts": of["facts"], "rows": of["rows"]} for part, of in found.items()}


_Parts = tuple[Callable[[], dict[str, Any]], dict[str, Callable[[], Any]]]
"""The functions for the facts of a device and for each part."""


def _on_gpu(tokens: Sequence[int] | None) -> _Parts:
    from veloxlab.codecs import METHODS
    from veloxlab.measure.bench import models, timing
    from veloxlab.measure.bench.builds import builds
    from veloxlab.measure.bench.host import host

    tokens = tuple(tokens or timing.TOKENS)
    return timing.facts, {
        "attention": lambda: timing.decode_attention(tokens=tokens),
        "methods": lambda: timing.attention_of_methods([name for name in METHODS if name != "none"]),
        "encode": timing.encode_steps,
        "decode": lambda: models.decode_steps(tokens=tokens),
        "read": models.read_prompts,
        "batch": models.batch_steps,
        "builds": builds,
        "host": host,
    }


def _on_cpu(tokens: Sequence[int] | None, caches: Sequence[str] | None, busy: bool) -> _Parts:
    from veloxlab.measure.bench import cpu, cpu_decode
    from veloxlab.measure.bench.host import host

    say, of_decode = partial(print, flush=True), tuple(tokens or cpu_decode.TOKENS)
    return cpu.facts, {
        "decode": lambda: cpu_decode.decode(of_decode, tuple(caches or cpu_decode.CACHES), busy, progress=say),
        "attention": lambda: cpu.attention_of_methods(tuple(tokens or cpu.TOKENS), progress=say),
        "encode": lambda: cpu.encode(progress=say),
        "fit": lambda: cpu.fit(progress=say),
        "host": lambda: host(progress=say),
    }


def bench_picture(results: dict[str, Any]) -> bytes:
    """Draw the times of attention of the first shape that ``veloxlab bench`` wrote, as a PNG."""
    import polars as pl

    from veloxlab.views import attention_times, picture

    shape, times = next(iter(pl.DataFrame(results["attention"]["rows"]).group_by(*tables.SHAPE, maintain_order=True)))
    heading = "Attention of one token: {} query heads, {} KV heads, head dimension {}".format(*shape)
    return picture.png(attention_times(times, heading=heading).to_dict())


def measure_lengths(
    model: str,
    random: bool,
    tokens: Sequence[int],
    layer_tokens: Sequence[int],
    quantized: Sequence[int],
    quantized_upto: int,
    file: Path | None,
) -> None:
    """Measure memory and time for each length, print the tables, and write them as JSON (also unfinished ones)."""
    import veloxlab as vl
    from veloxlab.measure.bench import models, shapes, timing

    if file:
        check_place(file)
    unfinished = file and file.with_suffix(".unfinished.json")
    results: dict[str, Any] = {"facts": timing.facts()}
    left_out: dict[str, Mapping[str, str]] = {}  # by model: why a cache lacks rows
    texts: list[str] = []

    def keep(name: str, rows: pl.DataFrame, missing: Mapping[str, str]) -> None:
        results[name], left_out[name] = rows.to_dicts(), dict(missing)
        _write_json(unfinished, results | {"left_out": left_out})

    for name, ns in ((model, tokens), ("one layer of 7B", layer_tokens)):
        if not ns:
            continue
        own = shapes.random_model(name) if random or name != model else vl.load(name)[0]
        caches = models.makers(own, theirs=quantized)
        few = [n for n in ns if n <= quantized_upto]
        lengths_of = {cache: few if cache.startswith("mlx-lm") else ns for cache in caches}
        frame = models.costs_by_length(own, caches, lengths_of, progress=say, on_rows=partial(keep, name))
        texts.append(f"{name}\n\n{tables.lengths_table(frame)}{tables.left_out_lines(left_out[name])}\n")
        print(texts[-1])
    if file and unfinished:
        unfinished.replace(file)
        write_atomically(file.with_suffix(".md"), "\n".join(texts).encode())


def _write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    if path:
        write_atomically(path, json.dumps(content, indent=1).encode())
