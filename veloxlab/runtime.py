"""What this machine offers: a fast BLAS for MLX's CPU back end, and facts about the device.

``load_fast_blas`` must run before ``mlx.core`` is imported, so nothing here imports MLX at the top.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from veloxlab import cgroups

if TYPE_CHECKING:
    import mlx.core as mx

FAST_GFLOPS = 10.0
PRODUCT_SIZE = 512
SWITCHED_OFF = "VELOXLAB_BLAS=0 switches the fast one off"
TOO_LATE = "mlx was imported before veloxlab"
NOT_INSTALLED = "the package ngsolve-openblas is not installed"
KEPT_BYTES = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc takes
SPIN = "OPENBLAS_THREAD_TIMEOUT"
SHORT_SPIN = "4"  # 2^4 cycles, the least that OpenBLAS takes
THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in the order in which OpenBLAS reads them
MLX_WHEELS = ("mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-metal")


@functools.cache
def load_fast_blas() -> str | None:
    """Give MLX's CPU back end a fast BLAS; call it before anything imports ``mlx.core``.

    The Linux wheel of MLX links the reference BLAS (2 GFLOP/s on two cores). OpenBLAS, loaded before it with global
    symbols, takes its place (130 GFLOP/s). macOS has Accelerate and needs nothing. ``VELOXLAB_BLAS=0`` in the
    environment switches this off.

    Returns
    -------
    str or None
        Why OpenBLAS was not loaded, as a part of a sentence; ``None`` where nothing is left to do. Never raises.
    """
    if platform.system() != "Linux":
        return None
    if os.environ.get("VELOXLAB_BLAS") == "0":
        return SWITCHED_OFF
    if "mlx.core" in sys.modules:
        return TOO_LATE
    if platform.machine() != "x86_64":
        return f"no OpenBLAS is packaged for {platform.machine()}"
    libraries = [path for folder in _package_folders("ngsolve_openblas") for path in folder.glob("libopenblas*.so*")]
    if not libraries:
        return NOT_INSTALLED
    _share_the_cores()
    try:
        _load_openblas(libraries[0])
    except OSError as error:
        return f"OpenBLAS could not be loaded ({error})"
    return None


def _share_the_cores() -> None:
    """Let OpenBLAS's threads, and numpy's, wait without spinning, and be no more than a control group gives time for.

    A thread that spins for long keeps other work, and other threads, from the core. OpenBLAS minds the affinity by
    itself. Environment variables that say otherwise stay as they are.
    """
    os.environ.setdefault(SPIN, SHORT_SPIN)
    if cores() < len(os.sched_getaffinity(0)) and not any(name in os.environ for name in THREADS):
        os.environ[THREADS[0]] = str(cores())


def blas_threads() -> int | None:
    """Threads that OpenBLAS has; None where it is not loaded."""
    count = getattr(ctypes.CDLL(None), "openblas_get_num_threads", None)
    return None if count is None else int(count())


def cores() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its control group, rounded up."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, math.ceil(cgroups.cpu_quota() or usable))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that MLX's CPU back end frees, up to 256 MB, for the next array.

    MLX has no pool of its own there. glibc gives large blocks back to the system at once, so that each array of some
    megabytes is made of pages that have to be mapped and cleared again: reading a tile of codes took three times as
    long. Does nothing on other systems, or where an environment variable of glibc's already says what to do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def _package_folders(name: str) -> list[Path]:
    """Find where a package lies without importing it: importing ngsolve_openblas loads the library, or fails to."""
    spec = find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]


def _load_openblas(library: Path) -> None:
    """Load OpenBLAS with global symbols, beside the Fortran runtime that MLX's wheel brings.

    OpenBLAS asks for libgfortran.so.5, which many machines lack, and looks for it in its own folder first. MLX's
    wheel has one under another name. So a folder of links brings them together; the loader needs it only now.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        for mlx in _package_folders("mlx"):
            for neighbour in (mlx.parent / "mlx_cpu.libs").glob("lib*"):
                (folder / neighbour.name).symlink_to(neighbour)
                if neighbour.name.startswith("libgfortran-"):
                    (folder / "libgfortran.so.5").symlink_to(neighbour)
        link = folder / "libopenblas.so.0"
        link.symlink_to(library)
        ctypes.CDLL(str(link), ctypes.RTLD_GLOBAL)


@dataclass(frozen=True)
class Device:
    """The device that MLX computes on: ``backend`` is ``"metal"``, ``"cuda"`` or ``"cpu"``.

    ``memory_bytes`` and ``cores`` are what this process may use.
    """

    backend: str
    name: str
    memory_bytes: int
    cores: int


def device() -> Device:
    """Describe the device that MLX uses by default.

    Memory of an NVIDIA GPU is its own; else it is the machine's, or what a control group allows of it.
    """
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    memory = int(info.get("memory_size") or info.get("total_memory") or _machine_memory_bytes())
    if backend() != "cuda":
        memory = min(memory, cgroups.memory_limit() or memory)
    return Device(backend(), name, memory, cores())


def backend() -> str:
    """Name the back end of MLX's default device: ``"metal"``, ``"cuda"`` or ``"cpu"``."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def driver() -> str:
    """The version of NVIDIA's driver, or nothing where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip().partition("\n")[0] if answer.returncode == 0 else ""


def _machine_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_gflops() -> float:
    """Measure a float32 product of two [512, 512] matrices on MLX's CPU stream, in GFLOP/s, the best of five.

    A fast BLAS takes a few milliseconds in all, the reference BLAS about half a second.
    """
    import mlx.core as mx

    a = mx.random.uniform(shape=(PRODUCT_SIZE, PRODUCT_SIZE), stream=mx.cpu)
    mx.eval(a)
    return 2 * PRODUCT_SIZE**3 / min(_seconds(a) for _ in range(5)) / 1e9


def _seconds(a: mx.array) -> float:
    import mlx.core as mx

    start = time.perf_counter()
    mx.eval(mx.matmul(a, a, stream=mx.cpu))
    return time.perf_counter() - start


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Give the installed version of each package, and leave out those that are not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def mlx_wheels() -> dict[str, bool]:
    """Give the installed wheels of MLX's library, each with whether the library in place is the one it brought.

    ``mlx-cpu`` and ``mlx-cuda-13`` own the same file: with both installed, the one unpacked last is used.
    """
    return {name: _owns_library(name) for name in installed_versions(MLX_WHEELS)}


def _owns_library(wheel: str) -> bool:
    libraries = [file for file in files(wheel) or () if file.stem == "libmlx"]
    return any(Path(str(file.locate())).stat().st_size == file.size for file in libraries)
