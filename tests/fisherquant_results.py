"""Divergences of FisherQuant on SmolLM2: ``python -m tests.fisherquant_results [NAME ...]`` adds to a result file.

Each row is written to ``data/results/fisherquant.json`` after its measurement, with a table in another file. Existing
rows are not measured again, except those that are named. A stopped run continues. Rows do not record the version of
the calibration: remove the file after a change of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import polars as pl

from veloxlab.cache.calibration import Calibration
from veloxlab.codecs import METHODS
from veloxlab.measure.experiments import mean_interval
from veloxlab.measure.quality import Reference, fidelity_to, reference
from veloxlab.store import write_atomically
from veloxlab.texts import shipped_folder

FILE = shipped_folder("data") / "results" / "fisherquant.json"
OFF: dict[str, dict[str, Any]] = {
    "scalar": {"code": "scalar"},
    "pca": {"metric": "pca"},
    "own axes": {"metric": "none"},
    "mean after RoPE": {"centre": "still"},
    "no mean": {"centre": "none"},
    "heads alike": {"planning": "head"},
    "coordinates alike": {"planning": "none"},
    "no scale": {"scale": "none"},
    "no sinks": {"sinks": 0},
}
"""The disabled part in each row of the ablation, at 2.25 bits."""
FITTED: dict[str, dict[str, Any]] = {"before RoPE": {"basis": "before_rope"}, "positions to 512": {"positions": 512}}
"""Options of the rows with their own calibration."""


BELOW = """
The version is the method's: one before gave other codes. True bits are of a packed value. Held bits are all bytes of
the layers for each value of the text, exact sinks and room for more tokens too; the tables of a method are apart.
Tokens but the sinks (4 where no row says another number) are read through their codes."""


def rows() -> dict[str, dict[str, Any]]:
    """Return the settings of `measured` by name."""
    found: dict[str, dict[str, Any]] = {f"{bits} bits": {"bits": bits} for bits in (2.25, 3.25, 4.25, 1.25)}
    found["2.25 bits, Python"] = {"bits": 2.25, "text": "Python"}
    found |= {f"without: {name}": {"bits": 2.25, **options} for name, options in OFF.items()}
    long: dict[str, Any] = {"tokens": 4096, "windows": 1}
    found["2.25 bits, 4096 tokens"] = {"bits": 2.25, **long}
    found["turboquant 2 bits, 4096 tokens"] = {"method": "turboquant", "bits": 2, **long}
    for name, fit in FITTED.items():
        found[f"2.25 bits, {name}"] = {"bits": 2.25, "fit": fit}
        found[f"2.25 bits, {name}, 4096 tokens"] = {"bits": 2.25, "fit": fit, **long}
    for bits in (2, 1):
        for scale in ("unbiased", "mse", "norm"):
            given = {"bits": bits, "key_options": {"scale": scale}}
            found[f"turboquant {bits} bits, {scale} keys"] = {"method": "turboquant", **given}
    found |= {f"{bits} bits, 1024 entries": {"bits": bits, "entries": 1024} for bits in (2.25, 1.25, 3.25, 4.25)}
    return found | {"calibration": {}}


@cache
def model() -> Any:
    return vl.load("smollm2-135m")


@cache
def calibration(**fit: Any) -> Calibration:
    return vl.calibrate(*model(), "fisherquant", **fit)


def price() -> dict[str, Any]:
    """Return the cost of a calibration from the start."""
    loaded = model()
    with TemporaryDirectory() as folder:
        begun = time.process_time()
        made = vl.calibrate(*loaded, "fisherquant", folder=folder)
        return {"cpu_seconds": time.process_time() - begun, "tokens": made.facts["tokens"]}


@cache
def exact(text: str, tokens: int, windows: int) -> Reference:
    """Return predictions on the test text, or on Python's argparse, which is not calibration text."""
    given = Path(argparse.__file__).read_text() if text == "Python" else None
    return reference(*model(), text=given, tokens=tokens, windows=windows)


def measured(
    bits: float,
    method: str = "fisherquant",
    text: str = "WikiText-2",
    tokens: int = 512,
    windows: int = 8,
    sinks: int = 4,
    key_options: dict[str, Any] | None = None,
    fit: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return KL in nats with all tokens but the sinks in codes: mean, interval and each window's."""
    wanted, begun = exact(text, tokens, windows), time.process_time()
    plan = vl.Plan.uniform(model()[0], method, bits=bits, **options)
    if key_options:
        plan = replace(plan, layers=tuple(replace(layer, key_options=key_options) for layer in plan.layers))
    given = {"calibration": calibration(**(fit or {}))} if method == "fisherquant" else {}
    made: list[Any] = []

    def make(of: Any) -> list[Any]:
        made[:] = vl.make_cache(of, plan, sinks=sinks, window=0, chunk="codes", **given)
        return list(made)

    frame = fidelity_to(wanted, make, per_token=True)
    kls = frame.group_by("window", maintain_order=True).agg(pl.col("kl").mean())["kl"].to_list()
    mean, low, high = mean_interval(kls) if windows > 1 else (kls[0], None, None)
    held, exact_bytes = vl.report(made).filter(pl.col("layer").is_not_null())[["held_bytes", "fp16_bytes"]].sum().row(0)
    codecs = [codec for layer in made for codec in (layer.key_codec, layer.value_codec)]
    sizes = {
        "true_bits": sum(codec.bits_per_value for codec in codecs) / len(codecs),
        "held_bits": 16 * held / exact_bytes,
        "held_bytes": held,
        "table_bytes": sum(codec.shared_bytes for codec in codecs),
    }
    settings = {
        "method": method,
        "bits": bits,
        "sinks": sinks,
        "options": options | (key_options or {}) | (fit or {}),
        "text": text,
    }
    settings |= {"tokens": tokens, "windows": windows, "version": METHODS[method].version}
    seconds = time.process_time() - begun
    return settings | {"kl": mean, "low": low, "high": high, "by_window": kls} | sizes | {"cpu_seconds": seconds}


def table(kept: dict[str, dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| cache | version | text | windows × tokens | true bits | held bits | KL in nats (95 % interval) |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, row in kept.items():
        if name == "calibration":
            continue
        between = "" if row["low"] is None else f" ({row['low']:.4f} to {row['high']:.4f})"
        sizes = f"{row['windows']} × {row['tokens']:,} | {row['true_bits']:.3f} | {row['held_bits']:.3f}"
        lines.append(f"| {name} | {row['version']} | {row['text']} | {sizes} | {row['kl']:.4f}{between} |")
    lines.append(BELOW)
    if "calibration" in kept:
        lines.append(
            "\nCalibration takes {cpu_seconds:.0f} CPU seconds for {tokens:,} tokens.".format(**kept["calibration"])
        )
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    """Measure missing rows, or the named ones."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, settings in rows().items():
        if name in names or (name not in kept and not names):
            kept[name] = measured(**settings) if settings else price()
            write_atomically(FILE, (json.dumps(kept, indent=1) + "\n").encode())
            write_atomically(FILE.with_suffix(".md"), table(kept).encode())
            print(name, kept[name].get("kl"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
