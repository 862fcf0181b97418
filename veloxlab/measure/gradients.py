"""Keys and values of a model with gradients of its loss, window by window, for codecs that minimise the loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Semaphore
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module

from veloxlab import runtime
from veloxlab.codecs import TENSORS, Tensor
from veloxlab.codecs.base import Sample
from veloxlab.errors import InputError
from veloxlab.measure.activations import capture_layers
from veloxlab.measure.derivative import drawn_gradients, evaluate
from veloxlab.mlxlm import probe
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.mlxlm.ropes import ropes_of
from veloxlab.progress import Progress, may_end
from veloxlab.store import digest, make_folder, read_arrays, reading, write_arrays

PATIENCE = 0.2  # seconds between two checks of whether the work may end, while another thread does it
FORMAT = "veloxlab gradients 1"
WINDOW = 512  # tokens of a window of text
AHEAD = 60  # percent of the layers, which a window goes while another differentiates its logits
_HELD = mx.bfloat16  # dtype of stored windows: magnitudes vary much, and eight bits are enough for a mean


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

    Much of the work has one thread. So on a CPU two windows share the cores, and need little more memory than one: see
    `Room`. A window that another thread cannot read, such as the first one of a model without gradients, is read again
    here.
    """
    missing = [w for w, each in enumerate(zip(said, files, strict=True)) if not _is_there(*each)]
    room, differentiable = Room(sum(found.compressible for found in probe.probe(model))), True
    begun: dict[int, Future[Path]] = {}
    with ExitStack() as stack:
        if runtime.backend() == "cpu":
            stack.enter_context(runtime.blas_shared_by(2))
            stack.enter_context(runtime.freed_memory_kept())
            pool = ThreadPoolExecutor(2)
            stack.callback(pool.shutdown, cancel_futures=True)
            for w in missing:
                read = partial(write_gradients, model, windows[w], said[w], files[w], room)
                begun[w] = pool.submit(copy_context().run, read)  # the work can end in that thread too
        for w in range(len(windows)):
            yield w
            if w in begun:
                with suppress(RuntimeError, ValueError):  # the next lines try again, and raise the error
                    while not wait([begun[w]], PATIENCE).done:
                        may_end()
                    begun.pop(w).result()
                    continue
            if w in missing:
                differentiable = _write(model, windows[w], said[w], files[w], differentiable, room)
            if begun and not differentiable:
                pool.shutdown(cancel_futures=True)
                begun.clear()


class Room:
    """Room in memory for the activations of a window and of some layers more.

    One window at a time runs forwards. Each layer takes its part of the room, and gives it back on the way back.
    """

    def __init__(self, layers: int) -> None:
        self.forwards = Lock()
        self._free = Semaphore(layers + 1 + layers * AHEAD // 100)  # one for the logits

    def take(self) -> None:
        """Wait for a part; the work can end meanwhile."""
        while not self._free.acquire(timeout=PATIENCE):
            may_end()

    def give_back(self, parts: int = 1) -> None:
        """Let the other window go on."""
        if parts:
            self._free.release(parts)


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


def _write(
    model: Module, ids: Sequence[int], said: Mapping[str, Any], file: Path, differentiable: bool, room: Room
) -> bool:
    """Write the arrays of a window, and return whether they have gradients."""
    if differentiable:
        try:
            write_gradients(model, ids, said, file, room)
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


def write_gradients(model: Module, ids: Sequence[int], said: Mapping[str, Any], file: Path, room: Room) -> Path:
    """Write keys, values and gradients by both of each layer; RuntimeError or ValueError if some have none."""
    taken = 0
    try:
        with room.forwards:
            run = drawn_gradients(model, ids, mx.random.key(said["seed"]))
            for steps in run.forwards:
                room.take()
                taken += 1
                evaluate(steps)
        for steps in run.backwards:
            evaluate(steps)
            room.give_back()
            taken -= 1
    finally:
        room.give_back(taken)
    if not all(mx.isfinite(g).all().item() and g.any().item() for pair in run.gradients for g in pair):
        raise ValueError("some gradients are zero or not finite")
    names = "keys", "values", "of_keys", "of_values"
    layers = [dict(zip(names, (*own, *pair), strict=True)) for own, pair in zip(run.seen, run.gradients, strict=True)]
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
