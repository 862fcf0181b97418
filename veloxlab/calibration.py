"""Calibration: real activations in, fitted codecs out, kept on disk so that a model is calibrated once."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import polars as pl
from mlx.nn.layers.base import Module

from veloxlab import integrate, prompt_cache
from veloxlab.checks import FILE, checked, either, many, whole
from veloxlab.codecs import ROLES, Codec, Role, find_method
from veloxlab.codecs.codec import Sample
from veloxlab.codecs.method import Method
from veloxlab.codecs.saving import check_version, from_parts, to_parts
from veloxlab.errors import InputError
from veloxlab.identity import fingerprint
from veloxlab.measure.activations import LayerCapture, capture_layers, first_tokens
from veloxlab.measure.progress import Progress, silent
from veloxlab.store import digest, kept, kept_in, write_together
from veloxlab.texts import excerpt

FORMAT = "veloxlab calibration 3"
USUAL_TOKENS = 1024
LEAST_TOKENS, LEAST_DISTINCT = 64, 16
_USUAL = f"give natural text of at least {LEAST_TOKENS} tokens; {USUAL_TOKENS:,} are usual"
Place = tuple[int, Role, int]  # layer, role, bits


@dataclass(frozen=True, eq=False)
class Calibration:
    """Codecs that were fitted to one model, for `veloxlab.make_cache` and the measurements.

    Attributes
    ----------
    method : id of the algorithm.
    facts : what it depends on: the method's version, hashes of the model and of the text; tokens, seed, widths,
        options.
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
                f"Make one with vl.calibrate(model, tokenizer, {method!r}, bits={sorted({*self.widths, bits})})."
            )
        return found

    @checked()
    def check_model(self, model: Module) -> None:
        """Raise `InputError` unless this was fitted to ``model``."""
        found = fingerprint(model)
        if found != self.facts["model"]:
            raise InputError(
                f"This calibration for {self.method!r} was made with the model {self.facts['model']} and not with this "
                f"one, whose hash of weights and rotary embeddings is {found}: make one for it with "
                f"vl.calibrate(model, tokenizer, {self.method!r}, bits={self.widths})."
            )

    @property
    def identity(self) -> str:
        """Sixteen hex digits over the method and all that a codec depends on: widths are fitted each alone."""
        return digest([self.method, {name: fact for name, fact in self.facts.items() if name != "bits"}])[:16]

    @property
    def widths(self) -> list[int]:
        """The bits that were fitted."""
        return sorted({at[2] for at in self.codecs})

    def joined(self, other: Calibration) -> Calibration:
        """Give this calibration with the widths of another one beside its own; codecs of each width are fitted alone.

        Raises
        ------
        InputError : the other differs in more than its widths: another method, model, text or option.
        """
        both = [{**c.facts, "method": c.method, "bits": None} for c in (self, other)]
        if both[0] != both[1]:
            differs = [name for name in both[0] if both[0][name] != both[1].get(name)]
            raise InputError(
                f"These calibrations differ in {', '.join(differs)} and not in widths alone: make both with the same."
            )
        widths = sorted({*self.widths, *other.widths})
        return Calibration(self.method, {**self.facts, "bits": widths}, {**self.codecs, **other.codecs})

    @property
    def frame(self) -> pl.DataFrame:
        """One row per codec: ``layer, tensor, bits, true_bits, table_bytes``."""
        rows = [
            (layer, role, bits, codec.bits_per_value, codec.shared_bytes)
            for (layer, role, bits), codec in self.codecs.items()
        ]
        return pl.DataFrame(rows, schema=["layer", "tensor", "bits", "true_bits", "table_bytes"], orient="row")

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write ``path`` with the suffix ``.safetensors`` and, beside it, ``.json``; give the path of the latter.

        Raises `InputError` where they cannot be written.
        """
        tensors, record = Path(path).with_suffix(".safetensors"), Path(path).with_suffix(".json")
        arrays: dict[str, mx.array] = {}
        entries = []
        for (layer, role, bits), codec in self.codecs.items():
            plain, own = to_parts(codec)
            name = f"{layer}.{role}.{bits}"
            entries.append({"layer": layer, "role": role, "bits": bits, "head_dim": codec.head_dim, "fields": plain})
            arrays |= {f"{name}/{key}": array for key, array in own.items()}
        content = {"format": FORMAT, "method": self.method, "facts": dict(self.facts), "codecs": entries}
        held = io.BytesIO()
        mx.save_safetensors(held, arrays or {"none": mx.zeros(1)})
        said = json.dumps({**content, "sha256": _seal(content, held.getvalue())}, indent=1)
        write_together({tensors: held.getvalue(), record: said.encode()})  # if one alone is moved, the seal tells
        return record

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; raises `InputError` for a file that is missing, damaged or of another version."""
        tensors, record = Path(path).with_suffix(".safetensors"), Path(path).with_suffix(".json")
        try:
            content = json.loads(record.read_bytes())
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')!r} and not {FORMAT!r}")
            if _seal(content, tensors.read_bytes()) != content.get("sha256"):
                raise ValueError(f"it or {tensors.name} is not what was written")
            facts = content["facts"]
            arrays: dict[str, mx.array] = mx.load(str(tensors))  # type: ignore[assignment]
            mx.eval(arrays)
            method = find_method(content["method"])
            check_version(method.id, facts["version"])
            codecs = {_place(entry): _codec(entry, method.id, facts, arrays) for entry in content["codecs"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise InputError(
                f"The calibration {record} cannot be read ({reason}): make it again with vl.calibrate."
            ) from error
        return cls(method.id, facts, codecs)


def calibration_of(method: str, calibration: Calibration | None) -> Calibration | None:
    """``calibration`` where it is this method's, else None: where methods are chosen, most of them need none."""
    return calibration if calibration is not None and calibration.method == method else None


@checked(bits=either(whole(), many(whole())), tokens=whole(LEAST_TOKENS))
def calibrate(
    model: Module,
    tokenizer: Any,  # noqa: ANN401
    method: str,
    text: str | None = None,
    *,
    bits: int | Sequence[int] = prompt_cache.DEFAULT_BITS,
    tokens: int = USUAL_TOKENS,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress = silent,
    **options: object,
) -> Calibration:
    """Fit a method's codecs to every layer of a model, on the model's own activations.

    The result is saved and found again by everything it depends on: the model's weights, the method and its options,
    the text, tokens, bits and seed. One layer's activations are held at a time. That of a method that was registered
    (`veloxlab.register`) is made anew each time: its code may have changed.

    In seconds of one core, SmolLM2 (30 layers, 1,024 tokens, float32) takes below 20 where only channels, means or
    levels are learned, 30 for SpectralQuant, 45 to 75 for VecInfer, and 70, 100, 145 and 170 for CommVQ at 1, 2, 3 and
    4 bits: it trains tables for values too, which takes as long as for keys. Each further width takes its time again.

    Parameters
    ----------
    model, tokenizer : as `veloxlab.load` gives them.
    method : a method's id.
    text : what the model reads; the shipped WikiText-2 validation excerpt by default.
    bits : the width, or all widths, to fit keys and values for.
    tokens : how much of the text, 64 or more.
    seed : of everything random.
    folder : where to keep it; the user's cache folder by default. Where it cannot be written a warning says so.
    progress : told of each layer; what it raises ends the work and nothing is saved.
    options : the method's own.

    Raises
    ------
    InputError : unknown method or option, bits out of range, a text that is too short or too uniform, or activations
        that are not finite.
    """
    found, widths = find_method(method), sorted({bits} if isinstance(bits, int) else set(bits))
    for width in widths:
        for role in ROLES:
            found.check(width, role, options)
    plain = _plain(options)
    ids = first_tokens(tokenizer, excerpt("validation") if text is None else text, tokens)
    _check_text(ids)
    facts = {
        "version": found.version,
        "model": fingerprint(model),
        "text": digest(ids),
        "tokens": len(ids),
        "seed": seed,
        "bits": widths,
        "options": plain,
    }

    def made() -> Calibration:
        return Calibration(method, facts, _fitted(model, ids, found, widths, seed, progress, options))

    if found.codecs:  # registered: a file could not tell whether its code is still the same
        return made()
    key = digest([FORMAT, method, facts])[:16]
    path = kept_in("calibrations", folder) / f"{method}-{key}.json"
    return kept(path, lambda path: _loaded(path, facts), made, Calibration.save)


def _loaded(path: Path, facts: dict[str, Any]) -> Calibration:
    """What was saved of the same ``facts``."""
    found = Calibration.load(path)
    if found.facts != facts:
        raise InputError(f"The calibration {path} was made of something else than its name says.")
    return found


def _fitted(
    model: Module,
    ids: Sequence[int],
    method: Method,
    widths: Sequence[int],
    seed: int,
    progress: Progress,
    options: Mapping[str, object],
) -> dict[Place, Codec]:
    """Codecs of every layer, side and width, fitted while the model reads ``ids``."""
    codecs: dict[Place, Codec] = {}
    layers = sum(f.compressible for f in integrate.probe(model))
    for done, seen in enumerate(capture_layers(model, ids)):
        progress(done, layers, f"fitting layer {seen.layer}")
        _check_finite(seen)
        for role, x in zip(ROLES, (seen.keys, seen.values), strict=True):
            queries = None if seen.queries is None else seen.queries.astype(mx.float32)
            sample = Sample(x.astype(mx.float32), queries, seen.rope, seed)
            for width in widths:
                codec = method.codec(x.shape[-1], width, role, **options)
                codecs[seen.layer, role, width] = codec.fit(sample)
    progress(layers, layers, "done")
    return codecs


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    """``options`` as they come back from a file."""
    try:
        return dict(json.loads(json.dumps(options)))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The options {dict(options)} cannot be written to a calibration's file ({error}): give plain numbers and "
            "words, or lists and mappings of them."
        ) from None


def _check_text(ids: Sequence[int]) -> None:
    if len(ids) < LEAST_TOKENS:
        count = f"{len(ids)} token{'s' * (len(ids) != 1)}"
        raise InputError(f"The calibration text has {count}, too few to fit anything to: {_USUAL}.")
    if len(set(ids)) < LEAST_DISTINCT:
        raise InputError(
            f"The calibration text has {len(set(ids))} different tokens among {len(ids)}, and at least "
            f"{LEAST_DISTINCT} are needed: {_USUAL}."
        )


def _check_finite(seen: LayerCapture) -> None:
    for name, x in (("queries", seen.queries), ("keys", seen.keys), ("values", seen.values)):
        if x is not None and not mx.isfinite(x).all().item():
            raise InputError(
                f"The {name} of layer {seen.layer} hold numbers that are NaN or infinite, to which nothing can be "
                "fitted: load the model with dtype='bfloat16' or 'float32', or look for what is wrong with its weights."
            )


def _seal(content: Mapping[str, Any], tensors: bytes) -> str:
    """Hash of all that a calibration's two files say, but for the hash itself."""
    said = {name: part for name, part in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode() + tensors).hexdigest()


def _place(entry: Mapping[str, Any]) -> Place:
    return entry["layer"], entry["role"], entry["bits"]


def _codec(entry: Mapping[str, Any], method: str, facts: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> Codec:
    layer, role, bits = _place(entry)
    prefix = f"{layer}.{role}.{bits}/"
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    unfitted = find_method(method).codec(entry["head_dim"], bits, role, **facts["options"])
    return from_parts(type(unfitted), entry["fields"], own)
