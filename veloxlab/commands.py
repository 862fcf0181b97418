"""mlx-lm's own commands on a compressed cache: its server, its generator, and its maker of prompt caches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module

from veloxlab import integrate, prompt_cache
from veloxlab.allocate.plan import Plan
from veloxlab.calibration import calibrate
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.models import DEMO_MODEL, load
from veloxlab.prompt_file import check_caches

_OURS = {
    "--model": "the model is the first word, as in `veloxlab {command} MODEL`",
    "--kv-bits": "the cache is compressed already: say how with --method and --bits, or leave those to mlx-lm",
    "--kv-group-size": "it belongs to --kv-bits, which a compressed cache takes the place of",
    "--quantized-kv-start": "it belongs to --kv-bits, which a compressed cache takes the place of",
}


@dataclass(frozen=True)
class Wanted:
    """What cache a command is to use: a plan's file, or a method and what else `veloxlab.make_cache` takes."""

    plan: Path | None
    method: str | None
    settings: dict[str, Any]  # bits, key_bits, value_bits, sinks, window, max_kv_size; only those that were given

    def __post_init__(self) -> None:
        if self.plan is not None and self.method is not None:
            raise InputError("--plan says which method each layer gets: leave out --method.")
        if self.method is not None:
            find_method(self.method)

    @property
    def given(self) -> bool:
        """Whether anything was asked for."""
        return self.plan is not None or self.method is not None or bool(self.settings)

    def maker(self, model: Module, tokenizer: Any) -> Callable[[], list[Any]]:  # noqa: ANN401
        """What makes one cache after another for ``model``; a method that has to be calibrated is, once, now."""
        settings = dict(self.settings)
        if self.plan is not None:
            plan = Plan.load(self.plan)
            return lambda: prompt_cache.make_cache(model, plan, **settings)
        method = self.method or "turboquant"
        if find_method(method).calibrated:
            usual = settings.get("bits", prompt_cache.DEFAULT_BITS)
            widths = {settings.get(side, usual) for side in ("key_bits", "value_bits")}
            settings["calibration"] = calibrate(model, tokenizer, method, bits=sorted(widths), progress=_say)
        return lambda: prompt_cache.make_cache(model, method, **settings)


class Loader:
    """What a command of mlx-lm calls in the place of its own ``load`` and ``load_prompt_cache``."""

    def __init__(self, module: Any, name: str, wanted: Wanted) -> None:  # noqa: ANN401
        self._load, self._read = module.load, getattr(module, "load_prompt_cache", None)
        self._name, self._wanted = name, wanted
        self._read_caches: list[Any] | None = None

    def load(self, path: str, **options: Any) -> tuple[Any, ...]:
        """Load as mlx-lm does, or a GGUF by `veloxlab.load`; the command's own model then makes compressed caches."""
        if path == DEMO_MODEL or path.lower().endswith(".gguf"):
            loaded: tuple[Any, ...] = (*load(path), {})[: 3 if options.get("return_config") else 2]
        else:
            loaded = self._load(path, **options)
        if path == self._name:  # and not a draft model, which is small
            model, tokenizer = loaded[:2]
            make = self._wanted.maker(model, tokenizer)
            integrate.use(model, make)
            if self._read_caches is not None:
                check_caches(model, self._read_caches, make() if self._wanted.given else None)
        return loaded

    def load_prompt_cache(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Read a file as mlx-lm does, and keep what was read until the model is there, which it has to fit."""
        assert self._read is not None
        read = self._read(*arguments, **options)
        self._read_caches = read[0] if options.get("return_metadata") else read
        return read


def run(command: str, theirs: str, name: str, wanted: Wanted, options: Sequence[str]) -> None:
    """Run mlx-lm's command ``theirs``, which is our ``command``, on the model ``name``, with its own ``options``.

    Raises
    ------
    InputError : an option that contradicts a compressed cache; a prompt cache's file that does not fit the model or
        what is ``wanted``.
    """
    for option in options:
        reason = _OURS.get(option.partition("=")[0])
        if reason:
            raise InputError(f"{option.partition('=')[0]} cannot be given here: {reason.format(command=command)}.")
    integrate.attach()  # a prompt cache's file is read before the model
    module = import_module(f"mlx_lm.{theirs}")
    loader = Loader(module, name, wanted)
    names = [hooked for hooked in ("load", "load_prompt_cache") if hasattr(module, hooked)]
    arguments = [f"mlx_lm.{theirs}", "--model", name, *options]
    hooks = {hooked: getattr(loader, hooked) for hooked in names}
    with integrate.replaced(module, hooks), integrate.replaced(sys, {"argv": arguments}):
        module.main()


def _say(done: int, total: int, label: str) -> None:
    print(f"{done} of {total}: {label}", file=sys.stderr)
