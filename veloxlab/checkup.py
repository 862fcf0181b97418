"""Looks at what veloxlab stands on, and says what to do where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from typing import Literal

from veloxlab import runtime
from veloxlab.errors import InputError

PACKAGES = (
    "veloxlab",
    "mlx",
    "mlx-lm",
    "jupyterlab",
    "altair",
    "anywidget",
    "vl-convert-python",
    "polars",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LEAST_MEMORY_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``hint`` says what to do about a ``status`` that is not ``"ok"``."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""


def doctor() -> list[Check]:
    """Check the device, the BLAS, the installed packages and the model's weights.

    Takes about a second, half of it a small matrix product where only the reference BLAS is there.
    """
    runtime.load_fast_blas()
    try:
        import mlx.core  # noqa: F401 - it fails where the libraries of a CUDA wheel are missing
    except ImportError as error:
        hint = "uv pip install --reinstall 'mlx[cpu]'"
        return [Check("back end", "fail", f"MLX cannot be imported: {error}", hint), *_packages()]
    return [_back_end(), _device(), _memory(), _blas(), _kernels(), *_packages(), _weights(), _browser()]


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


def _device() -> Check:
    device = runtime.device()
    return Check("device", "ok", f"{device.name}, {device.cores} CPU cores")


def _memory() -> Check:
    memory = runtime.device().memory_bytes
    detail = f"{memory / 2**30:.1f} GiB"
    if memory < LEAST_MEMORY_BYTES:
        return Check("memory", "warn", detail, "keep to small models and short contexts")
    return Check("memory", "ok", detail)


def _blas() -> Check:
    gflops = runtime.cpu_gflops()
    detail = f"{gflops:.0f} GFLOP/s in float32 on the CPU{_threads()}"
    threads = runtime.blas_threads() or 1
    if threads > runtime.cores():
        hint = next((f"unset {name}" for name in runtime.THREADS if name in os.environ), "start Python again")
        return Check("BLAS", "warn", f"{detail}, more than this process may use at once ({runtime.cores()})", hint)
    if gflops >= runtime.FAST_GFLOPS:
        return Check("BLAS", "ok", detail)
    reason = runtime.load_fast_blas() or "the CPU is busy or slow"
    hints = {
        runtime.SWITCHED_OFF: "unset VELOXLAB_BLAS",
        runtime.TOO_LATE: "import veloxlab before mlx",
        runtime.NOT_INSTALLED: "uv pip install ngsolve-openblas",
    }
    return Check("BLAS", "warn", f"{detail}: {reason}", hints.get(reason, "expect slow prefill"))


def _threads() -> str:
    """OpenBLAS's threads, and how long they spin."""
    count = runtime.blas_threads()
    if count is None:
        return ""
    spin = os.environ.get(runtime.SPIN, "")
    spins = "a short spin" if spin == runtime.SHORT_SPIN else f"{runtime.SPIN}={spin}"
    return f" with {count} thread{'s' * (count != 1)} and {spins}"


def _kernels() -> Check:
    from veloxlab.kernels.launch import SWITCH, gpu

    if runtime.backend() == "cpu":
        return Check("kernels", "ok", "none on a CPU: MLX graph ops do their work")
    if gpu() is None:
        return Check("kernels", "warn", f"switched off by {SWITCH}=0: MLX graph ops do their work", f"unset {SWITCH}")
    from veloxlab.kernels.checked import states, try_usual

    try_usual()
    wrong = [state for state in states() if state != "agrees"]
    if wrong:
        return Check("kernels", "warn", f"attend {wrong[0]}", "MLX graph ops do its work; please report it")
    return Check("kernels", "ok", f"attend agrees with its MLX-graph twin in {states()['agrees']} cases")


def _packages() -> list[Check]:
    versions = runtime.installed_versions(PACKAGES)
    missing = "not installed"
    return [
        Check("python", "ok", platform.python_version()),
        *(Check(name, "ok", versions[name]) for name in PACKAGES if name in versions),
        *(Check(name, "fail", missing, f"uv pip install {name}") for name in PACKAGES if name not in versions),
    ]


def _weights() -> Check:
    from veloxlab.models import DEMO_MODEL, demo_model_path

    try:
        path = demo_model_path()
    except InputError as error:
        return Check(DEMO_MODEL, "warn", "its weights are not installed", str(error))
    return Check(DEMO_MODEL, "ok", f"{path} ({path.stat().st_size / 1e6:.0f} MB)")


def _browser() -> Check:
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    return Check("browser", "ok", found or "no Chromium; only the browser tests of a developer need one")
