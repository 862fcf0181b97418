"""A plan: the method and bits of each layer's keys and values, as a file that people can read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from mlx.nn.layers.base import Module

from veloxlab import checks
from veloxlab.checks import BITS, OPTION_VALUES, WORDS, check_fields, checked
from veloxlab.codecs import TENSORS, Tensor, find_method
from veloxlab.errors import InputError
from veloxlab.mlxlm.identity import name_of
from veloxlab.mlxlm.probe import exact_width, probe
from veloxlab.store import digest, from_json, reading, to_json, write_atomically

if TYPE_CHECKING:
    import polars as pl

FORMAT = "veloxlab plan 1"
Chunk = Literal["exact", "codes"]
Sliding = Literal["compressed", "exact"]

DEFAULT_BITS = 4
FEW_KINDS = 3  # that `repr` of a plan lists
DEFAULT_SINKS, DEFAULT_WINDOW = 4, 64  # tokens; the first few get much attention in any text
DEFAULT_CHUNK: Chunk = "exact"
DEFAULT_SLIDING: Sliding = "compressed"


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one layer's cache: method and code bits of keys and of values, and the methods' options.

    ``options`` are for both, ``key_options`` and ``value_options`` for one of them, such as the widths of its heads.
    """

    key_method: str
    key_bits: float
    value_method: str
    value_bits: float
    options: dict[str, object] = field(default_factory=dict)
    key_options: dict[str, object] = field(default_factory=dict)
    value_options: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, key_method=WORDS, key_bits=BITS, value_method=WORDS, value_bits=BITS)
        check_fields(self, options=OPTION_VALUES, key_options=OPTION_VALUES, value_options=OPTION_VALUES)

    @property
    def tensors(self) -> tuple[tuple[Tensor, str, float, dict[str, object]], ...]:
        """``"keys"`` or ``"values"``, and its method, bits and options."""
        return (
            ("keys", self.key_method, self.key_bits, self.options | self.key_options),
            ("values", self.value_method, self.value_bits, self.options | self.value_options),
        )


def usual_bits(method: str, exact_bits: int, bits: float | None = None) -> float:
    """``bits``; by default `DEFAULT_BITS`, or those of an exact value for ``"none"``."""
    usual = exact_bits if method == "none" else DEFAULT_BITS
    return usual if bits is None else bits


def tensor_bits(
    method: str,
    exact_bits: int,
    bits: float | None = None,
    key_bits: float | None = None,
    value_bits: float | None = None,
) -> dict[Tensor, float]:
    """Code bits of keys and of values: ``key_bits`` and ``value_bits`` override ``bits``. None is the default."""
    both = usual_bits(method, exact_bits, bits)
    return {"keys": both if key_bits is None else key_bits, "values": both if value_bits is None else value_bits}


def cache_name(method: str, widths: Mapping[Tensor, float]) -> str:
    """The name of a cache of one method, such as ``"turboquant K4 V4"``."""
    return method if method == "none" else f"{method} K{widths['keys']} V{widths['values']}"


@dataclass(frozen=True, repr=False)
class Plan:
    """The settings of a cache for one model, for `veloxlab.make_cache`.

    ``layers`` has settings for each entry of the prompt cache. Settings of a layer that keeps its own cache are not
    used. ``allocation`` is the identity of the measurements that bits were allocated by, and ``calibrations`` has the
    identities of calibrations, by method.
    """

    model_hash: str
    layers: tuple[LayerSettings, ...]
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    chunk: Chunk = DEFAULT_CHUNK
    sliding: Sliding = DEFAULT_SLIDING
    name: str = ""
    model: str = ""
    allocation: str = ""
    calibrations: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line; `frame` lists every layer."""
        kinds: Counter[str] = Counter()
        for i, layer in enumerate(self.layers):
            key, value = (sum(self.widths(i, tensor)) / len(self.widths(i, tensor)) for tensor in TENSORS)
            other = "" if layer.value_method == layer.key_method else f"{layer.value_method} "
            kinds[f"{layer.key_method} K{key:.3g} {other}V{value:.3g}"] += 1
        each = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        said = each if len(kinds) <= FEW_KINDS else f"{len(self.layers)} layers of {len(kinds)} kinds"
        return f"Plan({said}; sinks={self.sinks}, window={self.window}; {self.model or self.model_hash})"

    def __post_init__(self) -> None:
        layers = checks.many(checks.instance(LayerSettings, "settings of a layer"))
        check_fields(self, layers=layers, calibrations=checks.MAPPING, model_hash=WORDS, model=WORDS, allocation=WORDS)
        check_fields(self, **{name: checks.ARGUMENTS[name] for name in ("sinks", "window", "chunk", "sliding", "name")})

    @classmethod
    @checked()
    def uniform(
        cls,
        model: Module,
        method: str = "turboquant",
        *,
        bits: float | None = None,
        key_bits: float | None = None,
        value_bits: float | None = None,
        sinks: int = DEFAULT_SINKS,
        window: int = DEFAULT_WINDOW,
        chunk: Chunk = DEFAULT_CHUNK,
        sliding: Sliding = DEFAULT_SLIDING,
        **options: object,
    ) -> Self:
        """The same method and bits for every layer of ``model``; raises `InputError` as `veloxlab.make_cache`."""
        widths = tensor_bits(method, exact_width(model), bits, key_bits, value_bits)
        settings = LayerSettings(method, widths["keys"], method, widths["values"], options)
        facts = probe(model)
        for tensor, _, width, given in settings.tensors:  # a plan with wrong settings is never saved
            for dim in {layer.dims[tensor] for layer in facts if layer.compressible}:
                find_method(method).codec(dim, width, tensor, **given)
        layers = (settings,) * (1 + max(layer.layer for layer in facts))
        return cls(model_hash(model), layers, sinks, window, chunk, sliding, cache_name(method, widths), name_of(model))

    @checked()
    def with_layer(self, layer: int, **changes: object) -> Self:
        """A plan with other settings of one layer: any fields of `LayerSettings`, such as ``key_bits=8``."""
        if not 0 <= layer < len(self.layers):
            raise InputError(f"This plan has layers 0 to {len(self.layers) - 1}, and no layer {layer}.")
        changed = replace(self.layers[layer], **changes)  # type: ignore[arg-type]
        for tensor, method, bits, options in changed.tensors:
            find_method(method).check(bits, tensor, options)
        return replace(self, layers=(*self.layers[:layer], changed, *self.layers[layer + 1 :]))

    @checked()
    def settings_for(self, model: Module) -> Sequence[LayerSettings]:
        """The layers' settings; raises `InputError` if the plan was made for a model of other shapes."""
        found = model_hash(model)
        if found != self.model_hash:
            raise InputError(
                f"The plan {self.name!r} was made for a model with hash {self.model_hash} ({self.model or 'unnamed'}), "
                f"and this one has {found} ({name_of(model)}): layers or head dimensions differ. Make a plan for it."
            )
        return self.layers

    @property
    def frame(self) -> pl.DataFrame:
        """A row for each layer: ``layer, key_method, key_bits, value_method, value_bits``; mean code bits of heads."""
        import polars as pl

        rows = []
        for i, layer in enumerate(self.layers):
            row: dict[str, Any] = {"layer": i}
            for tensor, method, _, _ in layer.tensors:
                bits = self.widths(i, tensor)
                row |= {f"{tensor[:-1]}_method": method, f"{tensor[:-1]}_bits": sum(bits) / len(bits)}
            rows.append(row)
        return pl.DataFrame(rows)

    def widths(self, layer: int, tensor: Tensor) -> tuple[float, ...]:
        """Code bits of each head of a layer's keys or values, or one number for all of them."""
        bits, options = next((bits, options) for name, _, bits, options in self.layers[layer].tensors if name == tensor)
        widths: Any = options.get("head_bits")
        widths = widths.get(tensor) if isinstance(widths, Mapping) else widths
        return (bits,) if widths is None else tuple(widths)

    @property
    def method_widths(self) -> dict[str, list[float]]:
        """The code bits that occur, by method."""
        found: dict[str, set[float]] = {}
        for _, method, bits, _ in (coded for layer in self.layers for coded in layer.tensors):
            found.setdefault(method, set()).add(bits)
        return {method: sorted(widths) for method, widths in found.items()}

    def to_json(self) -> str:
        """The text that `save` writes, with a checksum."""
        return to_json(FORMAT, asdict(self), indent=2) + "\n"

    @checked()
    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, atomically, and return the path; raises `InputError` if it cannot be written."""
        return write_atomically(path, self.to_json().encode())

    @classmethod
    @checked(path=checks.FILE)
    def load(cls, path: str | Path) -> Self:
        """Read a plan that `save` wrote; raises `InputError` if the file is missing or not a plan.

        To edit a file by hand, delete its line ``"sha256"``.
        """
        way_out = 'save it again with plan.save, or delete its line "sha256" if you changed it'
        with reading("plan", Path(path), way_out):
            return cls._of(Path(path).read_text())

    @classmethod
    @checked(text=WORDS)
    def from_json(cls, text: str) -> Self:
        """The plan of a text from `to_json`; raises `InputError` as `load`."""
        with reading("plan", None, "give what plan.to_json gave"):
            return cls._of(text)

    @classmethod
    def _of(cls, text: str) -> Self:
        content = json.loads(text)
        if isinstance(content, dict) and "sha256" not in content:  # written by hand
            text = to_json(content.pop("format", ""), content)
        content = from_json(text, FORMAT)
        layers = tuple(LayerSettings(**layer) for layer in content.pop("layers"))
        return cls(layers=layers, **content)


def plan_of(given: Any) -> Any:  # noqa: ANN401 - what `make_cache` takes
    """The plan in a file if a path is given; otherwise the argument."""
    return Plan.load(Path(given)) if isinstance(given, PathLike) else given


def model_hash(model: Module) -> str:
    """Twelve hex digits of a checksum over the shapes of a model's caches, which a plan depends on."""
    facts = "layer", "slot", "native", "compressible", "max_size", "kv_heads", "key_dim", "value_dim"
    return digest([[getattr(found, fact) for fact in facts] for found in probe(model)])[:12]
