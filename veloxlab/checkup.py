"""Looks at what veloxlab stands on, and says what to do where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from itertools import product
from typing import Literal

from veloxlab import runtime
from veloxlab.errors import InputError

PACKAGES = ("veloxlab", "mlx", "mlx-lm", "jupyterlab", "altair", "anywidget", "vl-convert-python", "polars")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LEAST_MEMORY_BYTES = 4 * 2**30
BLAS_HINTS = {
    runtime.SWITCHED_OFF: "unset VELOXLAB_BLAS",
    runtime.TOO_LATE: "import veloxlab before mlx",
    runtime.NOT_INSTALLED: "uv pip install ngsolve-openblas",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``hint`` says what to do about a ``status`` that is not ``"ok"``."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""


def doctor() -> list[Check]:
    """Check the device, the BLAS, the installed packages and the model's weights; takes about a second."""
    runtime.load_fast_blas()
    try:
        import mlx.core  # noqa: F401 - it fails where the libraries of a CUDA wheel are missing
    except ImportError as error:
        hint = "uv pip install --reinstall 'mlx[cpu]'"
        return [Check("back end", "fail", f"MLX cannot be imported: {error}", hint), *_packages()]
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    browser = Check("browser", "ok", found or "no Chromium; only the browser tests of a developer need one")
    return [_back_end(), *_device(), _blas(), _kernels(), *_packages(), _weights(), browser]


def _back_end() -> Check:
    wheels = runtime.mlx_wheels()
    used = ", ".join(name for name, in_place in wheels.items() if in_place)
    cuda = next((name for name in wheels if name.startswith("mlx-cuda")), None)
    detail = f"{runtime.backend()} ({used or 'built from source'})"
    if cuda and not wheels[cuda]:
        detail += f"; {cuda} is installed too, but another wheel's library lies over its own"
        return Check("back end", "warn", detail, f"uv pip install --no-deps --reinstall {cuda}")
    if not cuda and shutil.which("nvidia-smi"):
        return Check("back end", "warn", f"{detail}; there is an NVIDIA GPU", "uv sync --extra cuda")
    return Check("back end", "ok", detail)


def _device() -> list[Check]:
    device = runtime.device()
    few = device.memory_bytes < LEAST_MEMORY_BYTES
    hint = "keep to small models and short contexts" if few else ""
    memory = Check("memory", "warn" if few else "ok", f"{device.memory_bytes / 2**30:.1f} GiB", hint)
    return [Check("device", "ok", f"{device.name}, {device.cores} CPU cores"), memory]


def _blas() -> Check:
    gflops, count = runtime.cpu_gflops(), runtime.blas_threads()
    detail = f"{gflops:.0f} GFLOP/s in float32 on the CPU"
    if count is not None:
        spin = os.environ.get(runtime.SPIN, "")
        spins = "a short spin" if spin == runtime.SHORT_SPIN else f"{runtime.SPIN}={spin}"
        detail += f" with {count} thread{'s' * (count != 1)} and {spins}"
    if (count or 1) > runtime.cores():
        hint = next((f"unset {name}" for name in runtime.THREADS if name in os.environ), "start Python again")
        return Check("BLAS", "warn", f"{detail}, more than this process may use at once ({runtime.cores()})", hint)
    if gflops >= runtime.FAST_GFLOPS:
        return Check("BLAS", "ok", detail)
    reason = runtime.load_fast_blas() or "the CPU is busy or slow"
    return Check("BLAS", "warn", f"{detail}: {reason}", BLAS_HINTS.get(reason, "expect slow prefill"))


def _kernels() -> Check:
    from veloxlab.kernels.devices import BACKENDS, SWITCH, current_backend

    if runtime.backend() not in BACKENDS:
        return Check("kernels", "ok", "none on a CPU: MLX operations do their work")
    if current_backend() is None:
        return Check("kernels", "warn", f"switched off by {SWITCH}=0: MLX operations do their work", f"unset {SWITCH}")
    import mlx.core as mx

    from veloxlab.cache.attention import History, Segment
    from veloxlab.codecs.turboquant import TurboQuant
    from veloxlab.kernels.checked import states

    for dim, bits in product((64, 128), (2, 3, 4, 8)):
        codec, x = TurboQuant(dim, bits), mx.zeros((1, 2, 8, dim), mx.float16)
        history = History((Segment(codec, codec.encode(x), codec, codec.encode(x)),))
        mx.eval(history.attend(mx.zeros((1, 8, 1, dim), mx.float16), dim**-0.5, None))
    wrong = [state for state in states() if state != "agrees"]
    if wrong:
        return Check("kernels", "warn", wrong[0], "MLX operations do its work; please report it")
    return Check("kernels", "ok", f"{states()['agrees']} agree with their reference implementations")


def _packages() -> list[Check]:
    versions = runtime.installed_versions(PACKAGES)
    found = [Check(name, "ok", versions[name]) for name in PACKAGES if name in versions]
    missing = [Check(n, "fail", "not installed", f"uv pip install {n}") for n in PACKAGES if n not in versions]
    return [Check("python", "ok", platform.python_version()), *found, *missing]


def _weights() -> Check:
    from veloxlab.models.loading import DEMO_MODEL, demo_model_path

    try:
        path = demo_model_path()
    except InputError as error:
        return Check(DEMO_MODEL, "warn", "its weights are not installed", str(error))
    return Check(DEMO_MODEL, "ok", f"{path} ({path.stat().st_size / 1e6:.0f} MB)")
