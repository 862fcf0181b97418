"""Calibration: real activations in, fitted codecs out, kept on disk so that a model is calibrated once."""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
import platformdirs
import polars as pl
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from veloxlab import integrate
from veloxlab.codecs import Codec, Role, find_method
from veloxlab.codecs.codec import Sample
from veloxlab.codecs.saving import from_parts, to_parts
from veloxlab.errors import InputError
from veloxlab.files import write_atomically
from veloxlab.measure.activations import capture_layers, encode
from veloxlab.measure.progress import Progress, silent
from veloxlab.texts import excerpt

FORMAT = "veloxlab calibration 1"
USUAL_TOKENS = 1024
LEAST_TOKENS, LEAST_DISTINCT = 64, 16
ROLES: tuple[Role, Role] = ("keys", "values")
Place = tuple[int, Role, int]  # layer, role, bits


@dataclass(frozen=True, eq=False)
class Calibration:
    """Codecs that were fitted to one model, for `veloxlab.make_cache` and the measurements.

    Attributes
    ----------
    method : id of the algorithm.
    facts : what it depends on: hashes of the model, the text and the algorithm's file, tokens, seed, widths, options.
    codecs : the fitted codecs, by layer, role and bits.
    """

    method: str
    facts: Mapping[str, Any]
    codecs: Mapping[Place, Codec] = field(repr=False)

    def codec(self, method: str, layer: int, role: Role, bits: int) -> Codec:
        """Give the codec fitted to a layer's keys or values at ``bits``; raises `InputError` if there is none."""
        if method != self.method:
            raise InputError(
                f"This calibration is for {self.method!r} and not for {method!r}: "
                f"make one with vl.calibrate(model, tokenizer, {method!r})."
            )
        found = self.codecs.get((layer, role, bits))
        if found is None:
            layers = sorted({at[0] for at in self.codecs})
            raise InputError(
                f"This calibration holds no {role} of layer {layer} at {bits} bits: it has layers {layers[0]} to "
                f"{layers[-1]} at {', '.join(map(str, self.widths))} bits. "
                f"Make one with vl.calibrate(model, tokenizer, {method!r}, bits={bits})."
            )
        return found

    @property
    def widths(self) -> list[int]:
        """The bits that were fitted."""
        return sorted({at[2] for at in self.codecs})

    @property
    def frame(self) -> pl.DataFrame:
        """One row per codec: ``layer, tensor, bits, true_bits, table_bytes``."""
        rows = [
            (layer, role, bits, codec.bits_per_value, codec.shared_bytes)
            for (layer, role, bits), codec in self.codecs.items()
        ]
        return pl.DataFrame(rows, schema=["layer", "tensor", "bits", "true_bits", "table_bytes"], orient="row")

    def save(self, path: str | Path) -> Path:
        """Write ``path`` with the suffix ``.safetensors`` and, beside it, ``.json``; give the path of the latter."""
        tensors, record = Path(path).with_suffix(".safetensors"), Path(path).with_suffix(".json")
        arrays: dict[str, mx.array] = {}
        entries = []
        for (layer, role, bits), codec in self.codecs.items():
            plain, own = to_parts(codec)
            name = f"{layer}.{role}.{bits}"
            entries.append({"layer": layer, "role": role, "bits": bits, "head_dim": codec.head_dim, "fields": plain})
            arrays |= {f"{name}/{key}": array for key, array in own.items()}
        with tempfile.TemporaryDirectory(dir=tensors.parent) as folder:
            whole = Path(folder) / "arrays.safetensors"
            mx.save_safetensors(str(whole), arrays or {"none": mx.zeros(1)})
            digest = _digest(whole.read_bytes())
            whole.replace(tensors)
        content = {"format": FORMAT, "method": self.method, "facts": dict(self.facts), "sha256": digest}
        write_atomically(record, json.dumps({**content, "codecs": entries}, indent=1).encode())
        return record

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `InputError` for a file that is missing, damaged or of another version."""
        tensors, record = Path(path).with_suffix(".safetensors"), Path(path).with_suffix(".json")
        try:
            content = json.loads(record.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r} and not {FORMAT!r}")
            if _digest(tensors.read_bytes()) != content["sha256"]:
                raise ValueError(f"{tensors.name} is not what was written")
            arrays: dict[str, mx.array] = mx.load(str(tensors))  # type: ignore[assignment]
            mx.eval(arrays)
            method = find_method(content["method"])
            codecs = {_place(entry): _codec(entry, method.id, content["facts"], arrays) for entry in content["codecs"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise InputError(
                f"The calibration {record} cannot be read ({reason}): make it again with vl.calibrate."
            ) from error
        return cls(method.id, content["facts"], codecs)


def calibrate(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    method: str,
    text: str | None = None,
    *,
    bits: int | Sequence[int] = integrate.DEFAULT_BITS,
    tokens: int = USUAL_TOKENS,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress = silent,
    **options: object,
) -> Calibration:
    """Fit a method's codecs to every layer of a model, on the model's own activations.

    The result is saved and found again by everything it depends on: the model's weights, the method and its options,
    the text, tokens, bits and seed. One layer's activations are held at a time.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    method : a method's id.
    text : what the model reads; the shipped WikiText-2 validation excerpt by default.
    bits : the width, or all widths, to fit keys and values for.
    tokens : how much of the text.
    seed : of everything random.
    folder : where to keep it; the user's cache folder by default.
    progress : told of each layer; what it raises ends the work and nothing is saved.
    options : the method's own.

    Raises
    ------
    InputError : unknown method or option, bits out of range, or a text that is too short or too uniform.
    """
    found, widths = find_method(method), sorted({bits} if isinstance(bits, int) else set(bits))
    for width in widths:
        for role in ROLES:
            found.check(width, role, options)
    ids = encode(tokenizer, excerpt("validation") if text is None else text, tokens)
    _check_text(ids)
    facts = {
        "version": version("veloxlab"),
        "code": _digest(Path(inspect.getfile(found.build)).read_bytes())[:16],
        "model": fingerprint(model),
        "text": _digest(json.dumps(ids).encode()),
        "tokens": len(ids),
        "seed": seed,
        "bits": widths,
        "options": json.loads(json.dumps(options)),
    }
    where = Path(folder) if folder else platformdirs.user_cache_path("veloxlab") / "calibrations"
    where.mkdir(parents=True, exist_ok=True)
    key = _digest(json.dumps([FORMAT, method, facts], sort_keys=True).encode())[:16]
    path = where / f"{method}-{key}.json"
    if path.exists():
        try:
            kept = Calibration.load(path)
        except InputError as error:
            warnings.warn(f"{error} It is made again now.", stacklevel=2)
        else:
            if kept.facts == facts:
                return kept
    codecs: dict[Place, Codec] = {}
    layers = sum(f.compressible for f in integrate.probe(model))
    for done, seen in enumerate(capture_layers(model, ids)):
        progress(done, layers, f"fitting layer {seen.layer}")
        rope = integrate.rope_of(model, seen.layer)
        for role, x in zip(ROLES, (seen.keys, seen.values), strict=True):
            queries = None if seen.queries is None else seen.queries.astype(mx.float32)
            sample = Sample(x.astype(mx.float32), queries, rope, seed)
            for width in widths:
                codec = found.codec(x.shape[-1], width, role, **options)
                codecs[seen.layer, role, width] = codec.fit(sample)
    progress(layers, layers, "done")
    calibration = Calibration(method, facts, codecs)
    calibration.save(path)
    return calibration


def fingerprint(model: Module) -> str:
    """Sixteen hex digits over the names, shapes and some numbers of a model's parameters."""
    digest = hashlib.sha256()
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    for name, array in parameters:
        flat = array.reshape(-1)
        some = flat[:: max(1, flat.size // 64)].astype(mx.float32)
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.array(some).tobytes())
    return digest.hexdigest()[:16]


def _check_text(ids: Sequence[int]) -> None:
    usual = f"give natural text of at least {LEAST_TOKENS} tokens; {USUAL_TOKENS:,} are usual"
    if len(ids) < LEAST_TOKENS:
        raise InputError(f"The calibration text has {len(ids)} tokens, too few to fit anything to: {usual}.")
    if len(set(ids)) < LEAST_DISTINCT:
        raise InputError(
            f"The calibration text has {len(set(ids))} different tokens among {len(ids)}, and at least "
            f"{LEAST_DISTINCT} are needed: {usual}."
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _place(entry: Mapping[str, Any]) -> Place:
    return entry["layer"], entry["role"], entry["bits"]


def _codec(entry: Mapping[str, Any], method: str, facts: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> Codec:
    layer, role, bits = _place(entry)
    prefix = f"{layer}.{role}.{bits}/"
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    unfitted = find_method(method).codec(entry["head_dim"], bits, role, **facts["options"])
    return from_parts(unfitted, entry["fields"], own)
