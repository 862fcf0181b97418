"""mlx-lm's own commands with a compressed cache: its server, its generator, and its prompt cache command."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mlx.nn.layers.base import Module

from veloxlab.cache import make
from veloxlab.cache.calibration import Calibration
from veloxlab.cache.plan import DEFAULT_BITS, Plan, plan_of
from veloxlab.codecs import find_method
from veloxlab.errors import InputError
from veloxlab.measure.calibrate import calibrate
from veloxlab.mlxlm import hooks
from veloxlab.models.loading import DEMO_MODEL, load
from veloxlab.progress import Progress, say

DEFAULT_METHOD = "turboquant"
_REFUSED = {
    "--model": "the model is the first word, as in `veloxlab {command} MODEL`",
    "--kv-bits": "the cache is compressed already: say how with --method and --bits, or leave those to mlx-lm",
    "--kv-group-size": "it belongs to --kv-bits, which a compressed cache takes the place of",
    "--quantized-kv-start": "it belongs to --kv-bits, which a compressed cache takes the place of",
}


@dataclass(frozen=True)
class Wanted:
    """The cache that a command uses: from a plan, from a method, or, without both, from TurboQuant.

    ``settings``: more settings of `veloxlab.make_cache`, those that were given. ``calibrations``: for methods in use;
    missing ones are computed when the model is loaded.
    """

    method_or_plan: str | Plan | None
    settings: dict[str, Any]
    calibrations: Sequence[Calibration] = ()

    def __post_init__(self) -> None:
        used = self._widths()
        for unused in (each.method for each in self.calibrations if each.method not in used):
            raise InputError(f"A calibration of {unused} was given, and {', '.join(used)} is used: leave it out.")

    def maker(self, model: Module, tokenizer: Any, progress: Progress) -> Callable[[], list[Any]]:  # noqa: ANN401
        """Return a function that makes caches for ``model``; codecs that need a calibration are fitted now, once."""
        plan, learned = self.method_or_plan or DEFAULT_METHOD, {}
        if isinstance(plan, Plan):
            plan.settings_for(model)  # raises before any calibration
            learned = plan.calibrations
        fitted: dict[str, Calibration] = {}
        for each in self.calibrations:
            fitted[each.method] = fitted[each.method].joined(each) if each.method in fitted else each
        for method, widths in self._widths().items():
            if (find_method(method).calibrated or method in learned) and method not in fitted:
                fitted[method] = calibrate(model, tokenizer, method, bits=[*widths], progress=progress)
        return partial(make.make_cache, model, plan, **self.settings, calibration=[*fitted.values()])

    def _widths(self) -> Mapping[str, Sequence[float]]:
        if not isinstance(self.method_or_plan, Plan):
            usual = self.settings.get("bits", DEFAULT_BITS)
            both = {self.settings.get(name, usual) for name in ("key_bits", "value_bits")}
            return {find_method(self.method_or_plan or DEFAULT_METHOD).id: sorted(both)}
        return self.method_or_plan.method_widths


class Loader:
    """Replaces ``load`` and ``load_prompt_cache`` in a command of mlx-lm.

    ``stopped``, once set, ends a calibration and its thread.
    """

    def __init__(self, module: Any, name: str, wanted: Wanted) -> None:  # noqa: ANN401
        self._load, self._read = module.load, getattr(module, "load_prompt_cache", None)
        self._name, self._wanted = name, wanted
        self._read_caches: list[Any] | None = None
        self.stopped = threading.Event()

    def load(self, path: str, **options: Any) -> tuple[Any, ...]:
        """Load as mlx-lm does, or a GGUF by `veloxlab.load`; the command's model then makes compressed caches."""
        if path == DEMO_MODEL or path.lower().endswith(".gguf"):
            loaded: tuple[Any, ...] = (*load(path), {})[: 3 if options.get("return_config") else 2]
        else:
            loaded = self._load(path, **options)
        if path == self._name:  # not for a draft model, which is small
            model, tokenizer = loaded[:2]
            maker = self._wanted.maker(model, tokenizer, self.say)
            model.make_cache = maker  # mlx-lm's server and batches make prompt caches with it
            if self._read_caches is not None:
                given = self._wanted.method_or_plan or self._wanted.settings
                make.check_caches(model, self._read_caches, maker() if given else None)
        return loaded

    def say(self, done: int, total: int, label: str) -> None:
        """Print the progress of a calibration, or end it."""
        if self.stopped.is_set():
            raise KeyboardInterrupt
        say(done, total, label)

    def load_prompt_cache(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        """Read a file as mlx-lm does, and keep the caches until the model is loaded, for a check that they fit."""
        assert self._read is not None
        read = self._read(*arguments, **options)
        self._read_caches = read[0] if options.get("return_metadata") else read
        return read


def run(
    command: str,
    theirs: str,
    model: str,
    passed_on: Sequence[str],
    plan: Path | None,
    method: str | None,
    calibration: Sequence[Path],
    **settings: int | None,
) -> None:
    """Run mlx-lm's command ``theirs`` as our ``command`` on a ``model``, with mlx-lm's options ``passed_on``.

    ``settings``: of `veloxlab.make_cache`. Raises `InputError` for options that contradict each other, and for a prompt
    cache file that does not fit the model or the options.
    """
    if plan is not None and method is not None:
        raise InputError("--plan already contains the method of each layer: leave out --method.")
    for option in (word.partition("=")[0] for word in passed_on):
        if option in _REFUSED:
            raise InputError(f"{option} cannot be given here: {_REFUSED[option].format(command=command)}.")
    given = {name: number for name, number in settings.items() if number is not None}
    wanted = Wanted(plan_of(plan) or method, given, [*map(Calibration.load, calibration)])
    hooks.attach()  # a prompt cache file is read before the model
    module = import_module(f"mlx_lm.{theirs}")
    loader = Loader(module, model, wanted)
    replaced = {hooked: getattr(loader, hooked) for hooked in ("load", "load_prompt_cache") if hasattr(module, hooked)}
    if hasattr(module, "save_prompt_cache"):
        replaced["save_prompt_cache"] = make.save_cache
    if theirs == "server":
        from veloxlab.serve.server import hooks_of  # here, because it imports the server

        replaced |= hooks_of(loader.stopped)
    arguments = [f"mlx_lm.{theirs}", "--model", model, *passed_on]
    with patch.multiple(module, **replaced), patch.object(sys, "argv", arguments):
        module.main()
