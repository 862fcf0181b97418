"""Keys and values of a model with the gradients of its loss, window by window, for codes in the loss's own metric."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.cache.arithmetic import attend_exactly
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import Recorder, capture_layers
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.hooks import Mask
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress
from veloxlab.store import digest, make_folder, read_arrays, reading, write_arrays

FORMAT = "veloxlab gradients 1"
WINDOW = 512  # tokens of a stretch of text
_BLOCK = 128  # queries that attend together
_HELD = mx.bfloat16  # in which windows are kept: sizes vary much, and eight bits say enough of a mean


class _Perturbed(Recorder):
    """Adds to keys and values, where they enter the cache, what the loss is to be differentiated by."""

    def __init__(self, facts: probe.LayerFacts, perturbation: tuple[mx.array, ...]) -> None:
        super().__init__(facts)
        self._perturbation = perturbation

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        of_keys, of_values = self._perturbation
        return super().update_and_fetch(keys + of_keys.astype(keys.dtype), values + of_values.astype(values.dtype))

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """See `Handle.attend`; in blocks of queries where MLX would make all logits, those of later keys too."""
        if not isinstance(mask, str) or runtime.backend() != "cpu":  # "causal" is the only word
            return super().attend(q, scale, mask, sinks, cap)
        before, total = self.stored_keys.shape[2] - q.shape[2], self.stored_keys.shape[2]
        parts = []
        for i in range(0, q.shape[2], _BLOCK):
            seen = min(before + i + _BLOCK, total)
            own = q[:, :, i : i + _BLOCK], self.stored_keys[:, :, :seen], self.mixed[:, :, :seen]
            parts.append(attend_exactly(*own, scale, mask, sinks, cap))
        return mx.concatenate(parts, axis=2)


Pairs = Sequence[tuple[mx.array, ...]]
"""Something of each layer's keys and of its values."""


def loss_gradients(model: Module, ids: Sequence[int]) -> Pairs:
    """∂L/∂K ``[1, H, S, Dk]`` and ∂L/∂V ``[1, H, S, Dv]`` of each layer with plain keys and values, lazy, float32.

    L is the negative log-likelihood of the tokens that come next, summed, in nats. K is taken after RoPE. Raises MLX's
    RuntimeError or ValueError if a part of the model cannot be differentiated.
    """
    wanted = mx.array(list(ids[1:]))[:, None]

    def total(logits: mx.array) -> mx.array:
        return (mx.logsumexp(logits, axis=-1, keepdims=True) - mx.take_along_axis(logits, wanted, axis=-1)).sum()

    return _differentiated(model, ids[:-1], total)[1]


def drawn_gradients(model: Module, ids: Sequence[int], key: mx.array) -> tuple[Pairs, Pairs]:
    """Keys and values of each layer, and the gradients by them, as `loss_gradients`, of `signed_sum`."""
    return _differentiated(model, ids, lambda logits: signed_sum(logits, key))


def signed_sum(logits: mx.array, key: mx.array) -> mx.array:
    """Σ ±√p·log p over ``logits`` ``[S, vocabulary]``, with random signs, whose gradients tell the Fisher matrix.

    By the logits z the gradient is g = ±√p − p Σ ±√p, with p fixed. So E[ggᵀ] = diag(p) − ppᵀ, the Fisher matrix of
    what the model says next, and what differs between positions is not correlated. A label that is drawn from p has the
    same E[ggᵀ]. But where the model is nearly sure of one token it draws that, with a gradient near zero, but for once
    in 1 / (1 − p) times: the mean of few draws is far off.
    """
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    signs = 2.0 * mx.random.bernoulli(0.5, logits.shape, key).astype(logits.dtype) - 1
    return (mx.stop_gradient(signs * mx.exp(logs / 2)) * logs).sum()


def _differentiated(model: Module, ids: Sequence[int], total: Callable[[mx.array], mx.array]) -> tuple[Pairs, Pairs]:
    """Keys and values of each layer, and gradients by them of a ``total`` of the logits."""
    x = mx.array([list(ids)])

    def loss(perturbations: Pairs) -> tuple[mx.array, Pairs]:
        left = iter(perturbations)
        caches = probe.with_caches(model, lambda found: _Perturbed(found, next(left)))
        logits = model(x, cache=caches)[0].astype(mx.float32)  # of which no more copies are held than need be
        seen = [(own.stored_keys, own.stored_values) for own in probe.probes_of(caches) if isinstance(own, Recorder)]
        return total(logits), seen

    plain = [facts for facts in probe.probe(model) if facts.compressible]
    zeros = [tuple(mx.zeros((1, f.kv_heads, len(ids), dim)) for dim in f.dims.values()) for f in plain]
    (_, seen), gradients = mx.value_and_grad(loss)(zeros)
    return seen, gradients


def with_gradients(
    model: Module, windows: Sequence[Sequence[int]], sinks: int, seed: int, folder: Path, progress: Progress
) -> Iterator[tuple[int, Tensor, Sample]]:
    """Give each layer's keys, then its values, behind the sinks, with gradients that tell the Fisher matrix.

    It is of what the model says, not of the text: see `signed_sum`. Each window is a file in ``folder`` until the last
    layer is done, so that one layer's activations are held at a time, and the same work goes on where it was stopped. A
    model that cannot be differentiated gives queries in the place of gradients, with a warning.
    """
    facts = [found for found in probe.probe(model) if found.compressible]
    ropes, steps = ropes_of(model, windows[0]), len(windows) + len(facts)
    with _writable(folder) as place:
        files = [place / f"{w}.safetensors" for w in range(len(windows))]
        differentiable, of = True, fingerprint(model)
        for w, (ids, file) in enumerate(zip(windows, files, strict=True)):
            progress(w, steps, f"gradients of window {w + 1} of {len(windows)}")
            said = {"model": of, "text": digest(ids), "seed": seed + w}
            if not _is_there(said, file):
                differentiable = _write(model, ids, mx.random.key(seed + w), said, file, differentiable)
        for i, (found, rope) in enumerate(zip(facts, ropes, strict=True)):
            progress(len(windows) + i, steps, f"fitting layer {found.layer}")
            queries = _joined(files, f"{i}.queries", sinks)
            for tensor in TENSORS:
                x, gradients = (_joined(files, f"{i}.{name}{tensor}", sinks) for name in ("", "of_"))
                assert x is not None
                yield found.layer, tensor, Sample(x, queries, rope, seed, sinks, gradients)
        for file in files:
            file.unlink()
    progress(steps, steps, "done")


@contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    """The folder, which is removed once it is empty, or one for this run alone where it cannot be written."""
    with ExitStack() as stack:
        try:
            make_folder(folder)
        except InputError:
            folder = Path(stack.enter_context(TemporaryDirectory()))
        yield folder
        with suppress(OSError):
            folder.rmdir()


def _write(
    model: Module, ids: Sequence[int], key: mx.array, facts: Mapping[str, Any], file: Path, differentiable: bool
) -> bool:
    """Write what a window gives, and say whether that has gradients."""
    found = _gradients(model, ids, key) if differentiable else None
    layers = [dict(zip(("keys", "values", "of_keys", "of_values"), own, strict=True)) for own in found or ()]
    for seen in () if found else capture_layers(model, ids):
        seen.check_finite("to which nothing can be fitted", "queries", *TENSORS)
        layers.append({name: getattr(seen, name) for name in ("queries", *TENSORS)})
    arrays = {
        f"{i}.{name}": x.astype(_HELD) for i, own in enumerate(layers) for name, x in own.items() if x is not None
    }
    write_arrays(file, FORMAT, facts, arrays)
    return found is not None


def read(facts: Mapping[str, Any], file: Path) -> dict[str, mx.array]:
    """What a window gave; raises `InputError` for a file that is damaged, or depends on something else."""
    with reading("window of gradients", file, "delete it"):
        said, arrays = read_arrays(file, FORMAT)
        if said != facts:
            raise ValueError("it is of another model, text or seed")
        return arrays


def _is_there(facts: Mapping[str, Any], file: Path) -> bool:
    """Whether an earlier run left the window; a file that is refused is named in a warning."""
    if not file.exists():
        return False
    try:
        read(facts, file)
    except InputError as error:
        warnings.warn(f"{error} The file is made again now.", stacklevel=4)
        return False
    return True


def _gradients(model: Module, ids: Sequence[int], key: mx.array) -> Pairs | None:
    """Keys, values, and gradients by both of each layer."""
    try:
        seen, gradients = drawn_gradients(model, ids, key)
        mx.eval(seen, gradients)
        if all(mx.isfinite(g).all().item() and g.any().item() for pair in gradients for g in pair):
            return [(*own, *pair) for own, pair in zip(seen, gradients, strict=True)]
        why = "some gradients are zero or not finite"
    except (RuntimeError, ValueError) as error:
        why = str(error)
    warnings.warn(
        f"The loss of this model ({type(model).__module__}) gives no gradients of all keys and values ({why}). Its "
        "queries stand in for them: which layers and heads matter more is not known, and all count the same.",
        stacklevel=4,
    )
    return None


def _joined(files: Sequence[Path], name: str, sinks: int) -> mx.array | None:
    """An array of all windows as a batch ``[W, H, S, D]`` of float32, evaluated; None if one has none."""
    parts: list[mx.array | None] = [mx.load(str(file)).get(name) for file in files]  # type: ignore[union-attr]
    given = [part[:, :, sinks:] for part in parts if part is not None]
    if len(given) < len(parts):
        return None
    joined = mx.concatenate(given).astype(mx.float32)
    mx.eval(joined)
    return joined
