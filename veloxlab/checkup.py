"""Checks the installation that veloxlab needs, and says what to do if something is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from typing import Literal

from veloxlab import runtime
from veloxlab.errors import InputError

PACKAGES = ("veloxlab", "mlx", "mlx-lm", "jupyterlab", "altair", "anywidget", "vl-convert-python", "polars")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LEAST_MEMORY_BYTES = 4 * 2**30
SESSION_KERNELS = 6  # kernels that one model needs to read a prompt and decode, with the defaults
TOO_MANY = "more than this process may use at once ({})"
BLAS_HINTS = {
    runtime.SWITCHED_OFF: "unset VELOXLAB_BLAS",
    runtime.TOO_LATE: "import veloxlab before mlx",
    runtime.NOT_INSTALLED: "uv pip install ngsolve-openblas",
}


@dataclass(frozen=True)
class Check:
    """The result of one check: ``hint`` says what to do about a ``status`` that is not ``"ok"``."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    hint: str = ""


def doctor() -> list[Check]:
    """Check the device, the BLAS, kernels, packages and the model's weights. CPU kernels compile the first time."""
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
        spin, variable = os.environ.get(runtime.SPIN, ""), runtime.blas_variable()
        own = variable is None or os.environ[variable] == str(runtime.threads())
        spins = "a short spin" if spin == runtime.SHORT_SPIN else f"{runtime.SPIN}={spin}"
        detail += f" with {_threads(count)} ({runtime.reason_of_threads() if own else variable}) and {spins}"
    if (count or 1) > runtime.cores():
        hint = f"unset {runtime.blas_variable()}" if runtime.blas_variable() else "start Python again"
        return Check("BLAS", "warn", f"{detail}, {TOO_MANY.format(runtime.cores())}", hint)
    if gflops >= runtime.FAST_GFLOPS:
        return Check("BLAS", "ok", detail)
    reason = runtime.load_fast_blas() or "the CPU is busy or slow"
    return Check("BLAS", "warn", f"{detail}: {reason}", BLAS_HINTS.get(reason, "expect slow prefill"))


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _kernels() -> Check:
    from veloxlab.kernels.devices import SWITCH, current_backend

    if os.environ.get(SWITCH) == "0":
        return Check("kernels", "warn", f"switched off by {SWITCH}=0: MLX operations do their work", f"unset {SWITCH}")
    if current_backend() is None:
        detail = "none: numba, which compiles them for a CPU, is not installed; MLX operations do their work, slower"
        return Check("kernels", "warn", detail, "uv pip install numba")
    from veloxlab.kernels.backend import built_kernels
    from veloxlab.kernels.checked import states
    from veloxlab.kernels.compiled import folder as compiled_kernels

    _try_kernels()
    wrong = [state for state in states() if state != "agrees"]
    if wrong:
        return Check("kernels", "warn", wrong[0], "MLX operations do its work; please report it")
    detail = f"{states()['agrees']} agree with their reference implementations"
    if runtime.backend() == "cpu":
        return _loops(detail)
    detail += (
        f"; {built_kernels()} were built for that (a session of one model and method builds up to {SESSION_KERNELS})"
    )
    if runtime.backend() == "cuda":
        detail += f"; compiled ones are in {compiled_kernels()}"
    return Check("kernels", "ok", detail)


def _loops(detail: str) -> Check:
    from veloxlab.kernels.cpu.machine import folder

    count = runtime.threads()
    detail += f"; {_threads(count)} ({runtime.reason_of_threads()}) for their work; compiled loops are in {folder()}"
    if count > runtime.cores():
        detail += f"; the threads are {TOO_MANY.format(runtime.cores())}"
        return Check("kernels", "warn", detail, f"unset {runtime.OWN_THREADS}")
    return Check("kernels", "ok", detail)


def _try_kernels() -> None:
    """Encode and attend with scalar codes of 2, 3, 4 and 8 bits, head dimensions 64 and 128, and other layouts."""
    import mlx.core as mx

    from veloxlab.cache.attention import History
    from veloxlab.cache.past import Segment
    from veloxlab.codecs import METHODS

    scalar = [("turboquant", dim, bits) for dim in (64, 128) for bits in (2, 3, 4, 8)]
    for method, dim, bits in [*scalar, ("rvq", 64, 4), ("rabitq", 64, 4), ("qjl", 64, 4), ("polarquant", 64, 4)]:
        keys, values = (METHODS[method].codec(dim, bits, tensor) for tensor in ("keys", "values"))
        x = mx.zeros((1, 2, 8, dim), mx.float16)
        history = History((Segment(keys, keys.encode(x), values, values.encode(x)),))
        mx.eval(history.attend(mx.zeros((1, 8, 1, dim), mx.float16), dim**-0.5, None))


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
