"""Keys and values of a model with the gradients of its loss, window by window, for codes in the loss's own metric."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab.codecs import TENSORS, Tensor
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import LayerCapture, Recorder
from veloxlab.measure.quality import loss_gradients
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress
from veloxlab.store import make_folder, write_atomically

WINDOW = 512  # tokens of a stretch of text
_HELD = mx.bfloat16  # in which windows are kept: sizes vary much, and eight bits say enough of a mean


def with_gradients(
    model: Module, windows: Sequence[Sequence[int]], sinks: int, seed: int, folder: Path, progress: Progress
) -> Iterator[tuple[int, Tensor, Sample]]:
    """Give each layer's keys, then its values, behind the sinks, with gradients of the loss of labels that it draws.

    The Fisher matrix is of what the model says, not of the text: after every token a label is drawn from its own
    predictions. Each window is a file in ``folder`` until the last layer is done, so that one layer's activations are
    held at a time, and the same work goes on where it was stopped. A model that cannot be differentiated gives queries
    in the place of gradients, with a warning.
    """
    facts = [found for found in probe.probe(model) if found.compressible]
    ropes, steps = ropes_of(model, windows[0]), len(windows) + len(facts)
    with _writable(folder) as place:
        files = [place / f"{w}.safetensors" for w in range(len(windows))]
        differentiable = True
        for w, (ids, file) in enumerate(zip(windows, files, strict=True)):
            progress(w, steps, f"gradients of window {w + 1} of {len(windows)}")
            if not file.exists():
                differentiable = _write(model, ids, mx.random.key(seed + w), file, differentiable)
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


def _write(model: Module, ids: Sequence[int], key: mx.array, file: Path, differentiable: bool) -> bool:
    """Write what a window gives, and say whether that has gradients."""
    caches = probe.with_caches(model, Recorder)
    labels = mx.random.categorical(model(mx.array([list(ids)]), cache=caches)[0].astype(mx.float32), key=key)
    recorders = [r for r in probe.probes_of(caches) if isinstance(r, Recorder)]
    mx.eval(labels, [[r.keys, r.values, r.queries] for r in recorders])
    gradients = _gradients(model, ids, labels) if differentiable else None
    arrays: dict[str, mx.array] = {}
    for i, recorder in enumerate(recorders):
        seen = LayerCapture(recorder.facts.layer, recorder.queries, recorder.keys, recorder.values, None)
        seen.check_finite("to which nothing can be fitted", "queries", *TENSORS)
        own: dict[str, mx.array | None] = {"keys": seen.keys, "values": seen.values}
        own |= (
            dict(zip(("of_keys", "of_values"), gradients[i], strict=True)) if gradients else {"queries": seen.queries}
        )
        arrays |= {f"{i}.{name}": x.astype(_HELD) for name, x in own.items() if x is not None}
    held = io.BytesIO()
    mx.save_safetensors(held, arrays)
    write_atomically(file, held.getvalue())
    return gradients is not None


def _gradients(model: Module, ids: Sequence[int], labels: mx.array) -> list[tuple[mx.array, ...]] | None:
    try:
        found = [tuple(g.astype(_HELD) for g in pair) for pair in loss_gradients(model, ids, labels)]
        mx.eval(found)
        if all(mx.isfinite(g).all().item() and g.any().item() for pair in found for g in pair):
            return found
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
