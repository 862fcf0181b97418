"""Shapes of a model's caches: of a loaded model, of a configuration on disk, or typed in. Nothing is downloaded.

A configuration becomes a model of mlx-lm's own class whose weights are not computed. The same dry run as for any model
(`veloxlab.mlxlm.probe`) finds layers that slide, that share, or that keep something other than keys and values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache

from veloxlab.checks import MODEL, PATH, WORDS, check_fields, checked, either, instance, many, whole
from veloxlab.errors import InputError
from veloxlab.mlxlm.probe import REPLACED, LayerFacts, after_one_token, dry_run, exact_width, probe, slots_of
from veloxlab.mlxlm.weightless import weightless
from veloxlab.models.loading import DEMO_MODEL, load

PREDICTED = (*REPLACED, ArraysCache.__name__)  # mlx-lm's caches; the last one holds states
_NUMBERS = ("layers", "kv_heads", "head_dim", "value_dim", "sliding_window", "full_every")


@dataclass(frozen=True)
class ModelShape:
    """Shapes and sizes of a model's caches."""

    name: str
    caches: tuple[LayerFacts, ...]  # each of its caches, with KV heads and head dimensions
    exact_bytes: int = 2  # of a value in the model's own cache: 4 if the model computes in float32
    state_bytes: int = 0  # of the states of one sequence in all layers; they do not grow with its length
    parameters: int = 0  # number of weights of a configuration; 0 if unknown
    trained_tokens: int = 0  # trained context length by the configuration; 0 if it has none

    def __post_init__(self) -> None:
        check_fields(self, name=WORDS, caches=many(instance(LayerFacts, "facts of a cache")))
        numbers = dict.fromkeys(("state_bytes", "parameters", "trained_tokens"), whole(0))
        check_fields(self, exact_bytes=whole(1), **numbers)

    @classmethod
    @checked(**dict.fromkeys(_NUMBERS, whole(1)))
    def typed(
        cls,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        sliding_window: int | None = None,
        full_every: int | None = None,
        name: str = "typed in",
    ) -> Self:
        """A model of ``layers`` equal layers; raises `InputError` for a number below 1.

        ``value_dim``: the head dimension of the values if it differs from that of the keys. ``sliding_window``:
        tokens that a layer sees. ``full_every``: every so many layers, one sees all tokens; 6 for Gemma 3.
        """
        if full_every is not None and sliding_window is None:
            raise InputError(f"full_every={full_every} has no meaning without sliding_window: give that too.")

        def cache(layer: int) -> LayerFacts:
            seen = None if full_every and (layer + 1) % full_every == 0 else sliding_window
            kind = "RotatingKVCache" if seen else "KVCache"
            return LayerFacts(layer, kind, True, None, seen, 0, kv_heads, head_dim, value_dim or head_dim)

        return cls(name, tuple(map(cache, range(layers))))


_WORDS = re.compile(r"\d+[a-z]\b|[a-z]+|\d+")
_SIZES = {  # layers, KV heads, head dimension, weights, trained context in tokens (0: unknown)
    "1B, as Llama 3.2": (16, 8, 64, 1_235_814_400, 131_072),
    "3B, as Llama 3.2": (28, 8, 128, 3_212_749_824, 131_072),
    "8B, as Llama 3.1": (32, 8, 128, 8_030_261_248, 131_072),
    "14B, as Qwen 2.5": (48, 8, 128, 14_770_033_664, 0),
    "32B, as Qwen 2.5": (64, 8, 128, 32_763_876_352, 0),
    "70B, as Llama 3.1": (80, 8, 128, 70_553_706_496, 131_072),
}
SIZES = {
    name: replace(
        ModelShape.typed(layers=layers, kv_heads=heads, head_dim=head_dim, name=name),
        parameters=parameters,
        trained_tokens=trained,
    )
    for name, (layers, heads, head_dim, parameters, trained) in _SIZES.items()
}
"""Shapes of models of usual sizes, for planning without a model."""


def usual_size(words: str | Path) -> str:
    """Return the name of the only one of `SIZES` with all of these words, such as ``"llama 3 8b"``; empty if none.

    Case and punctuation do not count. A file or folder of that name takes precedence.
    """
    said = {*_WORDS.findall(str(words).casefold())}
    found = [name for name in SIZES if said and said <= {*_WORDS.findall(name.casefold())}]
    return found[0] if len(found) == 1 and not Path(words).exists() else ""


def taken_as(words: object) -> str:
    """Return a sentence if `shape_of` maps words to a usual size with another name; otherwise empty."""
    name = usual_size(words) if isinstance(words, str) else ""
    return f"{words!r} is taken as {name!r}." if name not in ("", words) else ""


ModelOrConfig = Module | ModelShape | Mapping[str, Any] | str | Path
_GIVEN = instance((ModelShape, Mapping), "a vl.models.ModelShape or the content of a config.json")
MODEL_OR_CONFIG = either(MODEL, _GIVEN, PATH)


@checked(model_or_config=MODEL_OR_CONFIG)
def shape_of(model_or_config: ModelOrConfig) -> ModelShape:
    """Return the shapes of a model's caches.

    Takes a loaded model, a `ModelShape` (returned unchanged), the content of a ``config.json``, its path or folder, the
    id of a Hugging Face repository with one in the local cache, ``"smollm2-135m"`` or a ``.gguf`` (which are loaded),
    or words from the name of one of `SIZES`. Raises `InputError` if it is not found, mlx-lm does not know it, or the
    bytes of a cache cannot be predicted.
    """
    model_or_config = loaded(model_or_config)
    if isinstance(model_or_config, ModelShape):
        return model_or_config
    if isinstance(model_or_config, Module):
        name = type(model_or_config).__module__.rpartition(".")[2]
        return _of_model(model_or_config, name, probe(model_or_config))
    if isinstance(model_or_config, Mapping):
        config, name = model_or_config, str(model_or_config.get("model_type", "no model"))
    elif size := usual_size(model_or_config):
        return SIZES[size]
    else:
        config, name = _read(Path(model_or_config).expanduser())
    model = weightless(config)
    parameters = sum(array.size for array in dict(tree_flatten(model.parameters())).values())
    return replace(_of_model(model, name, dry_run(model)), parameters=parameters)


def loaded(model_or_config: ModelOrConfig) -> ModelOrConfig:
    """Load ``"smollm2-135m"`` or a ``.gguf``; return anything else unchanged."""
    if isinstance(model_or_config, str | Path):
        path = Path(model_or_config).expanduser()
        if str(model_or_config) == DEMO_MODEL or path.suffix == ".gguf":
            return load(model_or_config)[0]
    return model_or_config


def _of_model(model: Module, name: str, caches: Sequence[LayerFacts]) -> ModelShape:
    for cache in caches:
        if cache.native not in PREDICTED:
            said = f"Layer {cache.layer} of {name} keeps mlx-lm's {cache.native}, whose bytes cannot be predicted"
            raise InputError(f"{said}: measure this model with vl.make_cache and vl.report.")
    made = after_one_token(model) if any(cache.native == PREDICTED[-1] for cache in caches) else []  # few have states
    states = sum(slot.nbytes for slot in slots_of(made) if isinstance(slot, ArraysCache))
    trained = getattr(getattr(model, "args", None), "max_position_embeddings", 0)  # of mlx-lm, if the family has it
    known = trained if isinstance(trained, int) else 0
    return ModelShape(name, tuple(caches), exact_width(model) // 8, states, trained_tokens=known)


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return the configuration at a path, or of a repository id, and a name for the model."""
    file = path / "config.json" if path.is_dir() else path
    name = file.parent.name if file.name == "config.json" else file.stem
    if not file.is_file():
        file, name = _in_hub_cache(str(path)), str(path)
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not a readable configuration ({error}): give a model's config.json.") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no configuration, which begins with a brace: give a model's config.json.")
    return config, name


def _in_hub_cache(repo: str) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, "config.json")
    except hub.HFValidationError:
        found = None
    if not isinstance(found, str):
        said = f"The folder {repo} has no config.json" if Path(repo).is_dir() else f"There is no file or folder {repo}"
        raise InputError(
            f"{said}, and no config.json of a repository of that name lies in the local Hugging Face cache; nothing "
            f"is downloaded here. Give a loaded model, a config.json, a usual size ({'; '.join(SIZES)}), or a shape "
            "and the size of its weights: "
            'vl.advise(vl.models.ModelShape.typed(layers=32, kv_heads=8, head_dim=128), weights="4.5 GB").'
        )
    return Path(found)
