"""The kinds of files that veloxlab writes, each with two different things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import polars as pl

from tests.tiny_models import tiny
from veloxlab import store
from veloxlab.allocate import rates, search, sensitivity, sweep
from veloxlab.allocate.budget import PlannedModel
from veloxlab.cache import calibration, plan, saved
from veloxlab.codecs.saving import to_parts
from veloxlab.measure import gradients
from veloxlab.measure.frames import in_schema
from veloxlab.measure.paired import WINDOWS
from veloxlab.measure.quality import FIDELITY
from veloxlab.widgets import runs
from veloxlab.widgets.selection import Choice

TEXT = "the quick brown fox jumps over the lazy dog while 1234567890 birds watch; " * 20


class Letters:
    """A tokenizer with one token for each character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 96 for letter in text]


@dataclass(frozen=True)
class Kind:
    """A kind of file: how two different things are made, written, read, and told apart."""

    make: Callable[[int], Any]  # the first or the second thing
    save: Callable[[Any, Path], object]
    load: Callable[[Path], Any]
    tell: Callable[[Any], str]  # a checksum of a thing's whole content
    suffix: str
    module: Any  # its ``FORMAT`` is the format's name
    elsewhere: Callable[[Path], object]  # uses the file with another model, or returns None if it is ignored
    method: Callable[[Path], object] | None = None  # uses it with another method
    version: str = ""  # the method whose codes it holds


@cache
def model(seed: int = 0) -> Any:
    """Return a small model; another seed gives other weights."""
    return tiny("llama", seed=seed)


@cache
def other_shape() -> Any:
    """Return a small model of another shape."""
    return tiny("llama", num_key_value_heads=4)


def _cache(number: int) -> list[Any]:
    made = vl.make_cache(model(), sinks=2, window=4)
    model()(mx.array([Letters().encode(TEXT[number:][:40])]), cache=made)
    mx.eval([layer.state for layer in made])
    return made


def _tell_cache(caches: Sequence[Any]) -> str:
    return store.digest(["".join(iter(layer.state[-1])) for layer in caches])


def _calibration(number: int) -> vl.Calibration:
    with TemporaryDirectory() as folder:
        given: dict[str, Any] = {"bits": 2, "tokens": 128, "seed": number, "folder": folder}
        return vl.calibrate(model(), Letters(), "spectralquant", TEXT[number:], **given)


def _tell_calibration(made: vl.Calibration) -> str:
    parts = [(place, *to_parts(codec)) for place, codec in made.codecs.items()]
    said = [(*place, plain, list(arrays)) for place, plain, arrays in parts]
    held = [array for *_, arrays in parts for array in arrays.values()]
    return store.digest([made.method, dict(made.facts), said], store.bytes_of(held))


def _rates(number: int) -> vl.allocate.RateBudget:
    with TemporaryDirectory() as folder:
        given: dict[str, Any] = {"bits": [2, 3], "by": "key_norm", "sequences": 1, "tokens": 32 + number, "sinks": 2}
        return vl.rate_budget(model(), Letters(), text=TEXT, folder=folder, **given)


def _search(number: int) -> search.SearchResult:
    rows = [
        (i, "turboquant", 2 + i, 4, 4, 0, [], 100.5 + number, 3, 0.3 / (i + 1), 0.1, 0.4, 0.02, 1.5, "front")
        for i in range(3)
    ]
    frame = pl.DataFrame(rows, schema=search.SEARCHED, orient="row")
    return search.SearchResult(frame, PlannedModel.of(model()), {}, {"tokens": 40})


def _tell_search(found: search.SearchResult) -> str:
    said = asdict(found.shape), dict(found.calibrations), dict(found.settings)
    return store.digest([found.frame.to_dict(as_series=False), *said])


def _unfinished(path: Path, of: int = 0) -> store.Unfinished:
    return store.Unfinished(path, sweep.FORMAT, {"model": f"a model {of}", "stretches": [[1, 2, 3]]})


def _save_unfinished(rows: object, path: Path) -> None:
    store.write_json(path, sweep.FORMAT, {"facts": _unfinished(path).facts, "rows": rows}, indent=None)


def _sensitivities(number: int) -> pl.DataFrame:
    same: dict[str, Any] = {"layer": 0, "head": 0, "sequence": 0, "tokens": 60, "by": "gradient"}
    rows = [{**same, "tensor": "keys", "sensitivity": 0.1 + number}, {**same, "tensor": "values", "sensitivity": 0.3}]
    return in_schema(pl.DataFrame(rows), sensitivity.EACH)


def _runs(number: int) -> runs.Runs:
    row = in_schema(pl.DataFrame({"name": ["x"], "kl_mean": [0.25 + number]}), FIDELITY)
    windows = pl.DataFrame({"window": [0, 1], "positions": [31, 31], "kl_mean": [0.2, 0.3]})
    made = runs.Runs()
    made.add(
        runs.Run("x", Choice(own_bits={1: (2, 3)}), "2026-11-30", "a text", number, row, in_schema(windows, WINDOWS))
    )
    return made


def _open_runs(path: Path) -> runs.Runs:
    made = runs.Runs()
    made.open(path)
    return made


def _facts(of: int = 0) -> dict[str, Any]:
    return {"model": f"a model {of}", "by": "gradient"}


def _arrays(number: int) -> dict[str, mx.array]:
    return {name: mx.random.normal((2, 8, 16), key=mx.random.key(number)) for name in ("0.keys", "0.of_keys")}


KINDS = {
    "cache": Kind(
        _cache,
        lambda made, path: vl.save_cache(path, made),
        lambda path: vl.load_cache(path, model()),
        _tell_cache,
        ".safetensors",
        saved,
        lambda path: vl.load_cache(path, model(1)),
        lambda path: vl.load_cache(path, model(), "rabitq"),
        "turboquant",
    ),
    "calibration": Kind(
        _calibration,
        lambda made, path: made.save(path),
        vl.Calibration.load,
        _tell_calibration,
        ".safetensors",
        calibration,
        lambda path: vl.make_cache(model(1), "spectralquant", bits=2, calibration=vl.Calibration.load(path)),
        lambda path: vl.make_cache(model(), "commvq", bits=2, calibration=vl.Calibration.load(path)),
        "spectralquant",
    ),
    "plan": Kind(
        lambda number: vl.Plan.uniform(model(), bits=3 + number),
        lambda made, path: made.save(path),
        vl.Plan.load,
        lambda made: store.digest(made.to_json()),
        ".json",
        plan,
        lambda path: vl.make_cache(other_shape(), path),
    ),
    "rates": Kind(
        _rates,
        lambda made, path: made.save(path),
        vl.allocate.RateBudget.load,
        lambda found: found.identity,
        ".json",
        rates,
        lambda path: vl.make_cache(other_shape(), vl.allocate.RateBudget.load(path).plan(2.5)),
    ),
    "search": Kind(
        _search,
        lambda made, path: made.save(path),
        search.SearchResult.load,
        _tell_search,
        ".parquet",
        search,
        lambda path: vl.make_cache(other_shape(), search.SearchResult.load(path).plan(0)),
    ),
    "unfinished sweep": Kind(
        lambda number: [{"bits": 2.5 + number, "kl_mean": 0.25, "allocation": "uniform"}],
        _save_unfinished,
        lambda path: _unfinished(path).read(),
        store.digest,
        ".json",
        sweep,
        lambda path: _unfinished(path, 1).read(),
    ),
    "sensitivities": Kind(
        _sensitivities,
        lambda made, path: sensitivity.write(_facts(), made, path),
        lambda path: sensitivity.read(_facts(), path),
        lambda made: store.digest(made.to_dict(as_series=False)),
        ".json",
        sensitivity,
        lambda path: sensitivity.read(_facts(1), path),
    ),
    "window of gradients": Kind(
        _arrays,
        lambda made, path: store.write_arrays(path, gradients.FORMAT, _facts(), made),
        lambda path: gradients.read(_facts(), path),
        lambda made: store.digest(sorted(made), store.bytes_of([made[name] for name in sorted(made)])),
        ".safetensors",
        gradients,
        lambda path: gradients.read(_facts(1), path),
    ),
    "runs": Kind(
        _runs,
        lambda made, path: made.save(path),
        _open_runs,
        lambda made: store.digest(made.table.to_dicts()),
        ".parquet",
        runs,
        lambda path: None,  # a run records its model, and makes no cache by itself
    ),
}
