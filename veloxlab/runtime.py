"""What this machine offers: a fast BLAS for MLX's CPU back end, limits of memory and CPU time, and facts of the device.

``load_fast_blas`` must run before ``mlx.core`` is imported, so nothing here imports MLX at the top.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import subprocess
import sys
import timeit
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FAST_GFLOPS = 10.0
SWITCHED_OFF = "VELOXLAB_BLAS=0 switches the fast one off"
TOO_LATE = "mlx was imported before veloxlab"
NOT_INSTALLED = "the package ngsolve-openblas is not installed"
MALLOPT = {-1: 256 << 20, -3: 32 << 20, -8: 1}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (glibc's most), M_ARENA_MAX
SPIN = "OPENBLAS_THREAD_TIMEOUT"
SHORT_SPIN = "4"  # 2^4 cycles, the least that OpenBLAS takes
THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in the order in which OpenBLAS reads them
OWN_THREADS = "VELOXLAB_THREADS"
MLX_WHEELS = ("mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-metal")
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GRAMMAR = "rfc3987_syntax"
NO_LIMIT = 2**60  # bytes: version 1 of control groups says 2^63, rounded to pages, where there is none


@functools.cache
def load_fast_blas() -> str | None:
    """Give MLX's CPU back end a fast BLAS; call it before anything imports ``mlx.core``.

    The Linux wheel of MLX links the reference BLAS (2 GFLOP/s on two cores). OpenBLAS, loaded before it with global
    symbols, takes its place (130 GFLOP/s). macOS needs nothing. ``VELOXLAB_BLAS=0`` switches this off. Returns why
    OpenBLAS was not loaded, as a part of a sentence, or None where nothing is left to do; never raises.
    """
    if platform.system() != "Linux":
        return None
    if os.environ.get("VELOXLAB_BLAS") == "0":
        return SWITCHED_OFF
    if "mlx.core" in sys.modules:
        return TOO_LATE
    if platform.machine() != "x86_64":
        return f"no OpenBLAS is packaged for {platform.machine()}"
    libraries = [path for folder in package_folders("ngsolve_openblas") for path in folder.glob("libopenblas*.so*")]
    if not libraries:
        return NOT_INSTALLED
    _share_the_cores()
    try:
        _load_openblas(libraries[0])
    except OSError as error:
        return f"OpenBLAS could not be loaded ({error})"
    return None


def _share_the_cores() -> None:
    """Let threads of OpenBLAS, and of NumPy, wait without spinning, and be as many as `threads` says.

    A thread that spins for long keeps other work from the core. OpenBLAS reads the affinity by itself. Environment
    variables that say otherwise stay as they are.
    """
    os.environ.setdefault(SPIN, SHORT_SPIN)
    if threads() != len(os.sched_getaffinity(0)) and blas_variable() is None:
        os.environ[THREADS[0]] = str(threads())


def blas_variable() -> str | None:
    """The environment variable that gives OpenBLAS its number of threads; None where none does."""
    return next((name for name in THREADS if name in os.environ), None)


def package_folders(name: str) -> list[Path]:
    """Where a package lies. It is not imported: importing ngsolve_openblas loads the library, or fails to."""
    spec = find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]


def _load_openblas(library: Path) -> None:
    """Load OpenBLAS with global symbols; the loader needs its folder of links only now."""
    with TemporaryDirectory() as name:
        sites = [mlx.parent for mlx in package_folders("mlx")]
        ctypes.CDLL(str(link_openblas(Path(name), library, sites)), ctypes.RTLD_GLOBAL)


def link_openblas(folder: Path, library: Path, sites: Iterable[Path]) -> Path:
    """Link OpenBLAS into ``folder``, beside the Fortran runtime that MLX's wheel has in one of ``sites``.

    OpenBLAS needs libgfortran.so.5, which many machines lack, and looks for it in its own folder first. MLX's wheel has
    one under another name. The folder of links brings them together.
    """
    for site in sites:
        for neighbour in (site / "mlx_cpu.libs").glob("lib*"):
            (folder / neighbour.name).symlink_to(neighbour)
            if neighbour.name.startswith("libgfortran-"):
                (folder / "libgfortran.so.5").symlink_to(neighbour)
    link = folder / "libopenblas.so.0"
    link.symlink_to(library)
    return link


def blas_threads() -> int | None:
    """Threads that OpenBLAS has; None where it is not loaded."""
    count = getattr(ctypes.CDLL(None), "openblas_get_num_threads", None)
    return None if count is None else int(count())


@contextmanager
def blas_shared_by(callers: int) -> Iterator[None]:
    """Give each of so many threads that call OpenBLAS together its share of OpenBLAS's threads, of one at least.

    Else they would wait for each other at each product.
    """
    had = blas_threads()
    if had is None:
        yield
        return
    set_threads = ctypes.CDLL(None).openblas_set_num_threads
    set_threads(max(1, had // callers))
    try:
        yield
    finally:
        set_threads(had)


def cpu_gflops() -> float:
    """GFLOP/s of float32 products of [512, 512] matrices on MLX's CPU stream, in half a second at most."""
    import mlx.core as mx

    size = 512
    a = mx.random.uniform(shape=(size, size), stream=mx.cpu)
    mx.eval(a)
    seconds = timeit.repeat(lambda: mx.eval(mx.matmul(a, a, stream=mx.cpu)), number=1, repeat=5)
    return 2 * size**3 / min(seconds) / 1e9


def defer_iri_grammar() -> None:
    """Let rfc3987_syntax build its grammar when it is first used: on import, as by Altair, it takes over a second."""
    spec = None if GRAMMAR in sys.modules else find_spec(GRAMMAR)
    if spec is None:
        return
    stand_in = module_from_spec(spec)  # which lacks every name until one is asked for

    def package() -> Any:  # noqa: ANN401
        if sys.modules.get(GRAMMAR) is stand_in:
            del sys.modules[GRAMMAR]
        return import_module(GRAMMAR)

    vars(stand_in).update(
        is_valid_syntax=lambda *given: package().is_valid_syntax(*given),
        __getattr__=lambda name: getattr(package(), name),
    )
    sys.modules[GRAMMAR] = stand_in


def keep_freed_memory() -> None:
    """Let glibc keep the memory that MLX's CPU back end frees, up to 256 MB, for the next array.

    MLX has no pool of its own there, and glibc gives large blocks back at once: each array of some megabytes was made
    of pages that had to be mapped and cleared again, and reading a tile of codes took three times as long. All threads
    share one arena: each kept what it freed, and a calibration of FisherQuant held 3.0 GB in the place of 2.0. Does
    nothing on other systems, or where an environment variable of glibc's already says what to do.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for option, size in MALLOPT.items():
        ctypes.CDLL(None).mallopt(option, size)


def cores() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its control group, rounded up."""
    return min(_affinity(), math.ceil(cpu_quota() or _affinity()))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def threads() -> int:
    """Threads that share the work of a CPU's kernels, and those of OpenBLAS: as many as `cores`.

    The environment variable ``VELOXLAB_THREADS`` may say another number. What is no number from 1 gives a warning.
    """
    said = os.environ.get(OWN_THREADS, "")
    if said.isdecimal() and int(said):
        return int(said)
    if said:
        warnings.warn(
            f"{OWN_THREADS} is {said!r}, which is no whole number from 1: {cores()} threads are used, as many as this "
            "process has cores. Set it to a number, or unset it.",
            stacklevel=2,
        )
    return cores()


def reason_of_threads() -> str:
    """What the number of `threads` comes from, in a few words."""
    if str(threads()) == os.environ.get(OWN_THREADS):
        return OWN_THREADS
    return "the control group's limit" if cores() < _affinity() else "the cores of this process"


def memory_limit() -> int | None:
    """Bytes that this process may use at most; None where no control group of Linux says so."""
    limits = [*_group_numbers("memory", "memory.limit_in_bytes"), *_group_numbers("", "memory.max")]
    return min((int(limit) for (limit,) in limits if limit < NO_LIMIT), default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that this process may use at most, such as 1.5; None where none is set."""
    spent = [*_group_numbers("", "cpu.max"), *_group_numbers("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return min((quota / period for quota, period in spent if quota > 0), default=None)  # -1 is none


def _group_numbers(controller: str, *names: str) -> Iterator[list[float]]:
    """Numbers in the files of these names, of each control group from this process's own up to the root.

    Without a ``controller`` those of version 2. A limit of a parent holds for its children: the least of all counts.
    """
    try:
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        # a container may see its own group as the root, and be told the path that the host sees
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents) if controller in controllers.split(",") else ():
            with suppress(OSError, ValueError):
                words = [word for name in names for word in (GROUPS / controller / part / name).read_text().split()]
                if "max" not in words:  # which is no limit
                    yield [float(word) for word in words]


@dataclass(frozen=True)
class Device:
    """The device that MLX computes on, named as by `backend`; memory and cores are what this process may use."""

    backend: str
    name: str
    memory_bytes: int
    cores: int


def device() -> Device:
    """The device of MLX; memory of an NVIDIA GPU is its own, else the machine's or what a control group allows."""
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(info.get("memory_size") or info.get("total_memory") or installed)
    if backend() != "cuda":
        memory = min(memory, memory_limit() or memory)
    return Device(backend(), name, memory, cores())


def backend() -> str:
    """Name the back end of MLX's default device: ``"metal"``, ``"cuda"`` or ``"cpu"``."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def driver() -> str:
    """The version of NVIDIA's driver, or nothing where there is none."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(asked, stderr=subprocess.DEVNULL, text=True).strip().partition("\n")[0]
    return ""


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Give the installed version of each package, and leave out those that are not installed."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def mlx_wheels() -> dict[str, bool]:
    """Installed wheels of MLX's library, and whether the library in place, which several own, is this wheel's."""
    return {
        wheel: any(
            Path(str(file.locate())).stat().st_size == file.size for file in files(wheel) or () if file.stem == "libmlx"
        )
        for wheel in installed_versions(MLX_WHEELS)
    }
