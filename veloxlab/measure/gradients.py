"""Keys and values of a model with gradients of its loss, window by window, for codecs that minimise the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.cache.arithmetic import attend_exactly
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import Recorder, capture_layers
from veloxlab.measure.softmax import softmax
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.hooks import Mask
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress, ended_by, is_endable, may_end
from veloxlab.store import digest, make_folder, read_arrays, reading, write_arrays

PATIENCE = 0.2  # seconds between two checks of whether the work may end, while another thread does it
FORMAT = "veloxlab gradients 1"
WINDOW = 512  # tokens of a window of text
_BLOCK = 128  # queries that attend together
_ROWS = 16  # positions whose logits are differentiated together
_HELD = mx.bfloat16  # dtype of stored windows: magnitudes vary much, and eight bits are enough for a mean


class _Perturbed(Recorder):
    """Adds a perturbation to keys and values where they enter the cache; the loss is differentiated by it."""

    def __init__(self, facts: probe.LayerFacts, perturbation: tuple[mx.array, ...]) -> None:
        super().__init__(facts)
        self._perturbation = perturbation

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        of_keys, of_values = self._perturbation
        return super().update_and_fetch(keys + of_keys.astype(keys.dtype), values + of_values.astype(values.dtype))

    def attend(
        self, q: mx.array, scale: float, mask: Mask, sinks: mx.array | None = None, cap: float | None = None
    ) -> mx.array:
        """See `Handle.attend`; works in blocks of queries where MLX would compute all logits, also of later keys."""
        if not isinstance(mask, str) or runtime.backend() != "cpu":  # "causal" is the only text
            return super().attend(q, scale, mask, sinks, cap)
        before, total = self.stored_keys.shape[2] - q.shape[2], self.stored_keys.shape[2]
        parts = []
        for i in range(0, q.shape[2], _BLOCK):
            seen = min(before + i + _BLOCK, total)
            own = q[:, :, i : i + _BLOCK], self.stored_keys[:, :, :seen], self.mixed[:, :, :seen]
            parts.append(attend_exactly(*own, scale, mask, sinks, cap, softmax))
        return mx.concatenate(parts, axis=2)


Pairs = Sequence[tuple[mx.array, ...]]
"""One item for each layer's keys and one for its values."""


def loss_gradients(model: Module, ids: Sequence[int]) -> Pairs:
    """Return ∂L/∂K ``[1, H, S, Dk]`` and ∂L/∂V ``[1, H, S, Dv]`` of layers with plain keys and values, lazy, float32.

    L is the negative log-likelihood of the next tokens, summed, in nats. K is taken after RoPE. Raises MLX's
    RuntimeError or ValueError if a part of the model cannot be differentiated.
    """
    wanted = mx.array(list(ids[1:]))[:, None]

    def total(logits: mx.array) -> mx.array:
        return (mx.logsumexp(logits, axis=-1, keepdims=True) - mx.take_along_axis(logits, wanted, axis=-1)).sum()

    _, seen, gradients = _differentiated(model, ids[:-1], total)
    if is_endable():
        _by_layer(seen)
        _by_layer(gradients[::-1])
    return gradients


def _by_layer(pairs: Pairs) -> None:
    """Evaluate the arrays layer by layer; the work can end between two layers."""
    for pair in pairs:
        mx.eval(pair)
        may_end()


def drawn_gradients(model: Module, ids: Sequence[int], key: mx.array) -> tuple[mx.array, Pairs, Pairs]:
    """Return logits, keys and values of each layer, and the gradients of `signed_sum` by them, as `loss_gradients`."""
    return _differentiated(model, ids, lambda logits: cast("mx.array", signed_sum(logits, key)))


@mx.custom_function
def signed_sum(logits: mx.array, key: mx.array) -> mx.array:
    """Return 0 as a function of ``logits`` ``[S, vocabulary]``; its gradients estimate the Fisher matrix.

    The gradient of a position is g = ±√p − p Σ ±√p, with random signs. So E[ggᵀ] = diag(p) − ppᵀ, the Fisher matrix of
    the next token's distribution, and different positions are uncorrelated. A label drawn from p has the same E[ggᵀ].
    But if the model is nearly sure of a token, the label is almost always that token, with a gradient near zero, and
    another one only once in 1 / (1 − p) draws: the mean of few draws has a large error.
    """
    return mx.zeros(())


@signed_sum.vjp
def _signed(given: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients of `signed_sum`, a few positions at a time, so that few arrays of their size are held."""
    logits, key = given
    signs, parts = mx.random.bernoulli(0.5, logits.shape, key), [mx.array(0.0)]
    for i in range(0, len(logits), _ROWS):
        p = softmax(mx.depends(logits[i : i + _ROWS], parts[-1]))
        signed = (2.0 * signs[i : i + _ROWS] - 1) * mx.sqrt(p)
        parts.append(cotangent * (signed - p * signed.sum(axis=-1, keepdims=True)))
    return mx.concatenate(parts[1:]), mx.zeros_like(key)


def _differentiated(
    model: Module, ids: Sequence[int], total: Callable[[mx.array], mx.array]
) -> tuple[mx.array, Pairs, Pairs]:
    """Return logits ``[S, vocabulary]``, keys and values of each layer, and the gradients of ``total`` by them."""
    x = mx.array([list(ids)])

    def loss(perturbations: Pairs) -> tuple[mx.array, tuple[mx.array, Pairs]]:
        left = iter(perturbations)
        caches = probe.with_caches(model, lambda found: _Perturbed(found, next(left)))
        logits = model(x, cache=caches).squeeze(0).astype(mx.float32)  # an index would make its gradient a scatter
        seen = [(own.stored_keys, own.stored_values) for own in probe.probes_of(caches) if isinstance(own, Recorder)]
        return total(logits), (logits, seen)

    plain = [facts for facts in probe.probe(model) if facts.compressible]
    zeros = [tuple(mx.zeros((1, f.kv_heads, len(ids), dim)) for dim in f.dims.values()) for f in plain]
    with ended_by(None):  # MLX evaluates nothing within a transformation
        (_, (logits, seen)), gradients = mx.value_and_grad(loss)(zeros)
    return logits, seen, gradients


def with_gradients(
    model: Module, windows: Sequence[Sequence[int]], sinks: int, seed: int, folder: Path, progress: Progress
) -> Iterator[tuple[int, Tensor, Sample]]:
    """Yield each layer's keys, then its values, after the sinks, with gradients that estimate the Fisher matrix.

    The Fisher matrix is of the model's predictions, not of the text: see `signed_sum`. Each window is a file in
    ``folder`` until the last layer is done. So the activations of one layer are held at a time, and an interrupted run
    continues. A model without gradients gives queries in their place, with a warning.
    """
    facts = [found for found in probe.probe(model) if found.compressible]
    ropes, steps, of = ropes_of(model, windows[0]), len(windows) + len(facts), fingerprint(model)
    said = [{"model": of, "text": digest(ids), "seed": seed + w} for w, ids in enumerate(windows)]
    with _writable(folder) as place:
        files = [place / f"{w}.safetensors" for w in range(len(windows))]
        for w in _write_all(model, windows, said, files):
            progress(w, steps, f"gradients of window {w + 1} of {len(windows)}")
        arrays: list[Any] = [mx.load(str(file)) for file in files]  # lazy
        for i, (found, rope) in enumerate(zip(facts, ropes, strict=True)):
            progress(len(windows) + i, steps, f"fitting layer {found.layer}")
            queries = _joined(arrays, f"{i}.queries", sinks)
            for tensor in TENSORS:
                x, gradients = (_joined(arrays, f"{i}.{name}{tensor}", sinks) for name in ("", "of_"))
                assert x is not None
                yield found.layer, tensor, Sample(x, queries, rope, seed, sinks, gradients)
        for file in files:
            file.unlink()
    progress(steps, steps, "done")


def _write_all(
    model: Module, windows: Sequence[Sequence[int]], said: Sequence[Mapping[str, Any]], files: Sequence[Path]
) -> Iterator[int]:
    """Write the missing files, and yield the number of each window before the wait for its file.

    Much of the work has one thread. So on a CPU two windows share the cores, and a lock lets only one run forwards:
    together they need little more memory than one. The first window is read alone: it evaluates lazy arrays of the
    model, which no other thread could do, and shows whether there are gradients.
    """
    missing = [not _is_there(*each) for each in zip(said, files, strict=True)]
    forwards, differentiable = Lock(), True
    begun: dict[int, Future[Path]] = {}
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(2)
        for w, (ids, own, file) in enumerate(zip(windows, said, files, strict=True)):
            yield w
            if not missing[w]:
                continue
            if w in begun:
                with suppress(RuntimeError, ValueError):  # the next lines try again, and raise the error
                    while not wait([begun[w]], PATIENCE).done:
                        may_end()
                    begun[w].result()
                    continue
            differentiable = _write(model, ids, own, file, differentiable)
            if differentiable and not begun and runtime.backend() == "cpu":
                stack.enter_context(runtime.blas_shared_by(2))
                stack.callback(pool.shutdown, cancel_futures=True)
                begun = {
                    later: pool.submit(
                        copy_context().run,  # the work can end in that thread too
                        _write_gradients,
                        model,
                        windows[later],
                        said[later],
                        files[later],
                        forwards,
                    )
                    for later in range(w + 1, len(windows))
                    if missing[later]
                }


@contextmanager
def _writable(folder: Path) -> Iterator[Path]:
    """The folder, removed when it is empty; or a temporary folder if it cannot be written."""
    with ExitStack() as stack:
        try:
            make_folder(folder)
        except InputError:
            folder = Path(stack.enter_context(TemporaryDirectory()))
        yield folder
        with suppress(OSError):
            folder.rmdir()


def _write(model: Module, ids: Sequence[int], said: Mapping[str, Any], file: Path, differentiable: bool) -> bool:
    """Write the arrays of a window, and return whether they have gradients."""
    if differentiable:
        try:
            _write_gradients(model, ids, said, file, Lock())
            return True
        except InputError:  # in the file
            raise
        except (RuntimeError, ValueError) as error:
            warnings.warn(
                f"The loss of this model ({type(model).__module__}) has no gradients for some keys and values "
                f"({error}). Its queries replace them: the importance of layers and heads is then unknown, and all "
                "have the same weight.",
                stacklevel=5,
            )
    layers = []
    for seen in capture_layers(model, ids):
        seen.check_finite("to which nothing can be fitted", "queries", *TENSORS)
        layers.append({name: getattr(seen, name) for name in ("queries", *TENSORS)})
    _write_layers(file, said, layers)
    return False


def _write_gradients(model: Module, ids: Sequence[int], said: Mapping[str, Any], file: Path, forwards: Lock) -> Path:
    """Write keys, values and gradients by both of each layer; RuntimeError or ValueError if some have none."""
    with forwards:
        logits, seen, gradients = drawn_gradients(model, ids, mx.random.key(said["seed"]))
        _by_layer(seen)
        mx.eval(logits)
    _by_layer(gradients[::-1])
    if not all(mx.isfinite(g).all().item() and g.any().item() for pair in gradients for g in pair):
        raise ValueError("some gradients are zero or not finite")
    names = "keys", "values", "of_keys", "of_values"
    layers = [dict(zip(names, (*own, *pair), strict=True)) for own, pair in zip(seen, gradients, strict=True)]
    return _write_layers(file, said, layers)


def _write_layers(file: Path, said: Mapping[str, Any], layers: Sequence[Mapping[str, mx.array | None]]) -> Path:
    arrays = {
        f"{i}.{name}": x.astype(_HELD) for i, own in enumerate(layers) for name, x in own.items() if x is not None
    }
    return write_arrays(file, FORMAT, said, arrays)


def read(facts: Mapping[str, Any], file: Path) -> dict[str, mx.array]:
    """Return the arrays of a window; raises `InputError` for a file that is damaged, or of other settings."""
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
        warnings.warn(f"{error} The file is made again now.", stacklevel=6)
        return False
    return True


def _joined(windows: Sequence[dict[str, mx.array]], name: str, sinks: int) -> mx.array | None:
    """Take an array of each window, as a batch ``[W, H, S, D]`` of float32, evaluated; None if one has none."""
    given = [own.pop(name)[:, :, sinks:] for own in windows if name in own]
    if len(given) < len(windows):
        return None
    joined = mx.concatenate(given).astype(mx.float32)
    mx.eval(joined)
    return joined
