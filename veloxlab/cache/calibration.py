"""A calibration: codecs that are fitted to one model, as data and as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.checks import FILE, checked
from veloxlab.codecs import Codec, Method, Tensor, find_method
from veloxlab.codecs.saving import check_version, from_parts, to_parts
from veloxlab.errors import InputError
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.store import digest, read_arrays, reading, write_arrays

if TYPE_CHECKING:
    import polars as pl

FORMAT = "veloxlab calibration 4"
Place = tuple[int, Tensor, int]  # layer, tensor, bits; 0 for a codec of all bits, which are planned later


@dataclass(frozen=True, eq=False)
class Calibration:
    """Codecs of a ``method`` that are fitted to one model, by layer, tensor and bits, for `veloxlab.make_cache`.

    ``facts`` has all that they depend on: the method's version, hashes of model and text, tokens, seed, bits, options.
    """

    method: str
    facts: Mapping[str, Any]
    codecs: Mapping[Place, Codec] = field(repr=False)
    _plans: dict[Any, Mapping[Place, Codec]] = field(init=False, default_factory=dict, repr=False)

    def codec(
        self,
        method: str,
        layer: int,
        tensor: Tensor,
        bits: float,
        options: Mapping[str, Any] | None = None,
        *,
        alone: bool = False,
    ) -> Codec:
        """Return the codec fitted to a layer's keys or values at ``bits``; raises `InputError` if there is none.

        If the method plans the bits of a whole model, the codec is planned with all others, or only with those of all
        keys or all values (``alone``), and may have other ``options``.
        """
        if method != self.method:
            raise InputError(
                f"This calibration is for {self.method!r} and not for {method!r}: "
                f"make one with vl.calibrate(model, tokenizer, {method!r})."
            )
        plan = find_method(method).planned
        if plan is not None:
            which = bits, alone and tensor, tuple((options or {}).items())
            if which not in self._plans:
                own = {at: codec for at, codec in self.codecs.items() if not alone or at[1] == tensor}
                self._plans[which] = plan(own, bits, **(options or {}))
            return self._plans[which][layer, tensor, 0]
        found = self.codecs.get((layer, tensor, int(bits)))
        if found is None:
            layers = [at[0] for at in self.codecs]
            raise InputError(
                f"This calibration holds no {tensor} of layer {layer} at {bits} bits: it has layers {min(layers)} to "
                f"{max(layers)} at {', '.join(map(str, self.widths))} bits. "
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
        """Sixteen hex digits of a checksum over the method and all that a codec depends on, but for other widths."""
        return digest([self.method, {name: fact for name, fact in self.facts.items() if name != "bits"}])[:16]

    @property
    def widths(self) -> list[int]:
        """The fitted bits; all whole numbers if bits are planned later."""
        method = find_method(self.method)
        return list(method.bits) if method.planned else sorted({at[2] for at in self.codecs})

    def joined(self, other: Calibration) -> Calibration:
        """A calibration with the widths of both; raises `InputError` if they differ in another fact."""
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
        import polars as pl

        rows = [(*place, codec.bits_per_value, codec.shared_bytes) for place, codec in self.codecs.items()]
        return pl.DataFrame(rows, schema=["layer", "tensor", "bits", "true_bits", "table_bytes"], orient="row")

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file and return its path; raises `InputError` if it cannot be written."""
        arrays: dict[str, mx.array] = {}
        entries = []
        for (layer, tensor, bits), codec in self.codecs.items():
            plain, own = to_parts(codec)
            entries.append({"layer": layer, "role": tensor, "bits": bits, "head_dim": codec.head_dim, "fields": plain})
            arrays |= {f"{layer}.{tensor}.{bits}/{name}": array for name, array in own.items()}
        content = {"method": self.method, "facts": dict(self.facts), "codecs": entries}
        return write_arrays(Path(path).with_suffix(".safetensors"), FORMAT, content, arrays)

    @classmethod
    @checked(path=FILE)
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote; raises `InputError` if it is missing, damaged or of another version."""
        with reading("calibration", Path(path), "make it again with vl.calibrate"):
            content, arrays = read_arrays(Path(path).with_suffix(".safetensors"), FORMAT)
            method, facts = find_method(content["method"]), content["facts"]
            check_version(method.id, facts["version"])
            codecs = {}
            for entry in content["codecs"]:
                layer, tensor, bits = entry["layer"], entry["role"], entry["bits"]
                prefix = f"{layer}.{tensor}.{bits}/"
                own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
                unfitted = method.codec(entry["head_dim"], bits or method.bits[0], tensor, **facts["options"])
                codecs[layer, tensor, bits] = from_parts(type(unfitted), entry["fields"], own)
            return cls(method.id, facts, codecs)


def layer_codec(
    method: Method,
    layer: int,
    head_dim: int,
    bits: float,
    tensor: Tensor,
    options: Mapping[str, object],
    calibration: Calibration | None,
    *,
    alone: bool = False,
) -> Codec:
    """The codec of a layer's keys or values, from a calibration or new; `InputError` as `Method.check`, or if missing.

    For ``alone`` see `Calibration.codec`.
    """
    method.check(bits, tensor, options)
    if calibration is not None:
        if options and not method.planned:
            raise InputError(f"{sorted(options)[0]} was given with a calibration, which has its own options.")
        return calibration.codec(method.id, layer, tensor, bits, options, alone=alone)
    if method.calibrated:
        raise InputError(
            f"{method.name} must be fitted to activations before it can encode: make calibration = "
            f"vl.calibrate(model, tokenizer, {method.id!r}, bits={bits}), and pass calibration=calibration."
        )
    return method.codec(head_dim, bits, tensor, **options)
