"""Caches of other projects on the same tokens. Each runs in its own environment, through its public names.

Bytes are counted from the arrays that a peer's cache holds, not from its own report: bytes that grow with tokens are
held bytes, other bytes are tables. Tokens that a cache does not compress are in the model's own type.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import polars as pl
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from veloxlab import offline, runtime
from veloxlab.errors import InputError
from veloxlab.measure import in_peer
from veloxlab.measure.experiments import Attempt, possible_rows
from veloxlab.measure.quality import FIDELITY, Reference, judged, log_probabilities, reference
from veloxlab.progress import OnRows, Progress, silent
from veloxlab.store import kept_in
from veloxlab.texts import Tokenizer

_AGREES = 1e-2  # nats: two versions of BLAS move a logit of SmolLM2 by 1e-4 at most
_SECONDS = 3600  # for one cache on all windows


class Peer(NamedTuple):
    """Another project's cache: its package at the tested version, and the bits to measure."""

    package: str
    version: str
    bits: tuple[int, ...]


PEERS = (
    Peer("turboquant-mlx-full", "0.30.0", (2, 3, 4)),
    Peer("mlx-turboquant", "0.0.2", (2, 3, 4, 8)),
    Peer("mlx-vlm", "0.7.10", (2, 3, 4)),
    Peer("veloxquant-mlx", "0.94.15", (1, 2)),
)


def compare_peers(
    model: Module,
    tokenizer: Tokenizer,
    *,
    text: str | None = None,
    tokens: int = 512,
    windows: int = 3,
    progress: Progress = silent,
    on_rows: OnRows = silent,
) -> tuple[pl.DataFrame, dict[str, str]]:
    """Measure the caches of `PEERS` as `compare` does ours: one row each, `FIDELITY`; and the reasons for missing ones.

    At the first use, ``uv`` makes a peer's environment in the user's cache, from a package index. Raises `InputError`:
    as `veloxlab.reference`; if there is no ``uv``; if `offline.SWITCH` is set and an environment is missing.
    """
    exact = reference(model, tokenizer, text=text, tokens=tokens, windows=windows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(model, folder / "model")
        attempts = [
            Attempt(f"{peer.package} {bits} bit", partial(_row, exact, folder, peer, bits))
            for peer in PEERS
            for bits in peer.bits
        ]
        return possible_rows(attempts, len(attempts), FIDELITY, progress, on_rows)


def beside(theirs: pl.DataFrame, ours: pl.DataFrame) -> pl.DataFrame:
    """Add to each row of ``theirs``, as ``_ours`` columns, the row of ``ours`` that loses least in no more held bytes.

    Both have the columns of `FIDELITY`; held bytes are without tables. Rows without such a row of ours are left out.
    """
    pairs = theirs.join(ours, how="cross", suffix="_ours").filter(pl.col("held_bytes_ours") <= pl.col("held_bytes"))
    best = pairs.sort("kl_mean_ours", "held_bytes_ours").group_by("name").first()
    return best.with_columns(ratio=pl.col("kl_mean_ours") / pl.col("kl_mean")).sort("held_bits", "name")


def save_model(model: Module, folder: Path) -> None:
    """Write a model in mlx-lm's format: configuration and weights; raises `InputError` if it has no configuration."""
    settings = getattr(model, "args", None)
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise InputError(
            f"The model {type(model).__name__} has no configuration (args) that other projects could read."
        )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(settings)))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))


def environment(peer: Peer) -> Path:
    """Return the Python of a peer's environment, which is made if missing, with MLX and mlx-lm in our versions."""
    folder = kept_in("peers") / f"{peer.package}-{peer.version}"
    python, whole = folder / "bin" / "python", folder / "whole"
    if whole.exists():
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise InputError("The environments of other projects are made by uv, which is not installed: pip install uv.")
    if offline.is_set():
        raise InputError(f"{offline.SWITCH} is set, and {peer.package} is not installed: unset it once.")
    mlx = f"{'mlx[cpu]' if runtime.backend() == 'cpu' else 'mlx'}=={importlib.metadata.version('mlx')}"
    packages = [f"{peer.package}=={peer.version}", mlx, f"mlx-lm=={importlib.metadata.version('mlx-lm')}"]
    if runtime.backend() == "cpu":
        packages.append("ngsolve-openblas")
    _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)])
    _run([uv, "pip", "install", "--quiet", "--python", str(python), *packages])
    whole.touch()
    return python


def _row(exact: Reference, folder: Path, peer: Peer, bits: int) -> pl.DataFrame:
    python = environment(peer)
    stretches = [stretch[:-1] for stretch in exact.stretches]
    asked = {"peer": peer.package, "bits": bits, "stretches": stretches}
    (folder / "asked.json").write_text(json.dumps(asked))
    _run([str(python), in_peer.__file__, str(folder)], os.environ | _fast_blas(python.parents[1]))
    found = json.loads((folder / "found.json").read_text())
    native = np.array(log_probabilities(mx.array(np.load(folder / "exact.npy"))))
    difference = np.abs(native - np.array(exact.log_probs[0][: len(native)])).max()
    if not difference < _AGREES:
        raise InputError(f"{peer.package}: predictions of the exact cache differ there by {difference:.2g} nats.")
    logits = (mx.array(np.load(folder / f"logits_{window}.npy")) for window in range(len(stretches)))
    return judged(exact, logits, name=f"{peer.package} {bits} bit", **found)


def _fast_blas(environment: Path) -> dict[str, str]:
    """Return settings that put an environment's OpenBLAS before the BLAS of MLX's wheel, which is ten times slower."""
    libraries = list(environment.glob("lib/python*/site-packages/ngsolve_openblas/libopenblas*.so*"))
    if not libraries:
        return {}
    links = environment / "blas"
    if not links.exists():
        links.mkdir()
        runtime.link_openblas(links, libraries[0], [libraries[0].parents[1]])
    return {"LD_LIBRARY_PATH": str(links), "LD_PRELOAD": str(links / "libopenblas.so.0")}


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run a command; raises `InputError` with the last line of its output if it fails."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{Path(command[0]).name} did not end within {_SECONDS} seconds.") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise InputError(f"{Path(command[0]).name} failed: {last}")
