"""Facts of this machine: a fast BLAS for MLX's CPU back end, limits of memory and CPU time, and the device.

``load_fast_blas`` must run before ``mlx.core`` is imported, so this module does not import MLX at the top.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
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
MALLOPT = {-1: 256 << 20, -3: 32 << 20, -4: 65536, -8: 1}
"""M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (glibc's most), M_MMAP_MAX (glibc's default), M_ARENA_MAX"""
KEEP_ALL = {-1: 2**31 - 1, -4: 0}  # M_TRIM_THRESHOLD, M_MMAP_MAX
SPIN = "OPENBLAS_THREAD_TIMEOUT"
SHORT_SPIN = "4"  # 2^4 cycles, the least that OpenBLAS accepts
THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in the order in which OpenBLAS reads them
OWN_THREADS = "VELOXLAB_THREADS"
MLX_WHEELS = ("mlx-cpu", "mlx-cuda-13", "mlx-cuda-12", "mlx-metal")
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GRAMMAR = "rfc3987_syntax"
NO_LIMIT = 2**60  # bytes: version 1 of control groups has 2^63, rounded to pages, for no limit


@functools.cache
def load_fast_blas() -> str | None:
    """Load a fast BLAS for MLX's CPU back end; call this before anything imports ``mlx.core``.

    The Linux wheel of MLX links the reference BLAS (2 GFLOP/s on two cores). OpenBLAS, loaded earlier with global
    symbols, replaces it (130 GFLOP/s). macOS needs nothing. ``VELOXLAB_BLAS=0`` switches this off. Returns the reason
    why OpenBLAS was not loaded, as a part of a sentence, or None if nothing is left to do; never raises.
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
    """Make threads of OpenBLAS and NumPy wait without a long spin, and set their number to `threads`.

    A thread that spins keeps other work from its core. OpenBLAS reads the affinity by itself. Environment
    variables that are already set do not change.
    """
    os.environ.setdefault(SPIN, SHORT_SPIN)
    if threads() != len(os.sched_getaffinity(0)) and blas_variable() is None:
        os.environ[THREADS[0]] = str(threads())


def blas_variable() -> str | None:
    """Return the environment variable that sets OpenBLAS's number of threads; None if none is set."""
    return next((name for name in THREADS if name in os.environ), None)


def package_folders(name: str) -> list[Path]:
    """Return the folders of a package without its import, because ngsolve_openblas loads its library on import."""
    spec = find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or ()]


def _load_openblas(library: Path) -> None:
    """Load OpenBLAS with global symbols; the loader needs the folder of links only now."""
    with TemporaryDirectory() as name:
        sites = [mlx.parent for mlx in package_folders("mlx")]
        ctypes.CDLL(str(link_openblas(Path(name), library, sites)), ctypes.RTLD_GLOBAL)


def link_openblas(folder: Path, library: Path, sites: Iterable[Path]) -> Path:
    """Link OpenBLAS into ``folder``, beside the Fortran runtime that MLX's wheel has in one of ``sites``.

    OpenBLAS needs libgfortran.so.5, which many machines do not have, and searches its own folder first. MLX's wheel has
    one with another name. The folder of links contains both.
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
    """Return the number of OpenBLAS's threads; None if it is not loaded."""
    count = getattr(ctypes.CDLL(None), "openblas_get_num_threads", None)
    return None if count is None else int(count())


def blas_settings() -> list[tuple[Callable[[], int], Callable[[int], object]]]:
    """Return the functions that get and set the threads of each OpenBLAS: of MLX, and NumPy's own."""
    numpys = [own for folder in package_folders("numpy") for own in folder.parent.glob("numpy.libs/libscipy_openblas*")]
    symbols = [(None, "openblas_{}_num_threads"), *((str(own), "scipy_openblas_{}_num_threads64_") for own in numpys)]
    found: list[tuple[Callable[[], int], Callable[[int], object]]] = []
    for library, name in symbols:
        with suppress(AttributeError):  # not loaded, or another build
            found.append((ctypes.CDLL(library)[name.format("get")], ctypes.CDLL(library)[name.format("set")]))
    return found


@contextmanager
def blas_shared_by(callers: int) -> Iterator[None]:
    """Divide the threads of each OpenBLAS between ``callers`` threads that call it at the same time, at least one each.

    Otherwise they would wait for each other at each product, and spin meanwhile.
    """
    settings = [(put, get()) for get, put in blas_settings()]
    for put, had in settings:
        put(max(1, had // callers))
    try:
        yield
    finally:
        for put, had in settings:
            put(had)


def cpu_gflops() -> float:
    """Measure GFLOP/s of float32 products of [512, 512] matrices on MLX's CPU stream, in at most half a second."""
    import mlx.core as mx

    size = 512
    a = mx.random.uniform(shape=(size, size), stream=mx.cpu)
    mx.eval(a)
    seconds = timeit.repeat(lambda: mx.eval(mx.matmul(a, a, stream=mx.cpu)), number=1, repeat=5)
    return 2 * size**3 / min(seconds) / 1e9


def defer_iri_grammar() -> None:
    """Make rfc3987_syntax build its grammar on first use: at its import, by Altair, this takes over a second."""
    spec = None if GRAMMAR in sys.modules else find_spec(GRAMMAR)
    if spec is None:
        return
    stand_in = module_from_spec(spec)  # has no names until the first access

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
    """Make glibc keep up to 256 MB of the memory that MLX's CPU back end frees, for later arrays.

    MLX has no memory pool on a CPU, and glibc returns large blocks to the system at once. Without this, the system had
    to map and clear the pages of each array of some megabytes, and reading a tile of codes took three times as long.
    All threads share one arena: with several, each kept its freed memory, and a calibration of FisherQuant held 3.0 GB
    instead of 2.0. Does nothing on other systems, or if an environment variable of glibc sets these values.
    """
    _set_malloc(MALLOPT)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Make glibc keep all freed memory in the block, and give it back afterwards; see `keep_freed_memory`.

    For work that frees and allocates large arrays again and again: the system then clears their pages only once.
    """
    _set_malloc(KEEP_ALL)
    try:
        yield
    finally:
        if _set_malloc(MALLOPT):
            ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(options: Mapping[int, int]) -> bool:
    """Set options of glibc's malloc, and return True; without glibc or beside its own variables, return False."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
    return True


def cores() -> int:
    """Return the processors that this process may use by its affinity and its control group's quota, rounded up."""
    return min(_affinity(), math.ceil(cpu_quota() or _affinity()))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def threads() -> int:
    """Return the number of threads for a CPU's kernels and for OpenBLAS: by default that of `cores`.

    The environment variable ``VELOXLAB_THREADS`` can set another number; a value that is no number from 1 gives a
    warning.
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
    """Return the source of the number of `threads`, in a few words."""
    if str(threads()) == os.environ.get(OWN_THREADS):
        return OWN_THREADS
    return "the control group's limit" if cores() < _affinity() else "the cores of this process"


def memory_limit() -> int | None:
    """Return the most bytes that this process may use; None if no control group of Linux has a limit."""
    limits = [*_group_numbers("memory", "memory.limit_in_bytes"), *_group_numbers("", "memory.max")]
    return min((int(limit) for (limit,) in limits if limit < NO_LIMIT), default=None)


def cpu_quota() -> float | None:
    """Return the most processor time that this process may use, in processors, such as 1.5; None for no limit."""
    spent = [*_group_numbers("", "cpu.max"), *_group_numbers("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return min((quota / period for quota, period in spent if quota > 0), default=None)  # -1 is no limit


def _group_numbers(controller: str, *names: str) -> Iterator[list[float]]:
    """Yield the numbers in the named files of each control group, from this process's own up to the root.

    Without a ``controller``, the files are of version 2. Limits of parents hold for children: the least one counts.
    """
    try:
        groups = [line.split(":", 2) for line in OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        # a container may see its own group as the root, but get the path on the host
        own = Path(path.lstrip("/"))
        for part in (own, *own.parents) if controller in controllers.split(",") else ():
            with suppress(OSError, ValueError):
                words = [word for name in names for word in (GROUPS / controller / part / name).read_text().split()]
                if "max" not in words:  # no limit
                    yield [float(word) for word in words]


@dataclass(frozen=True)
class Device:
    """MLX's device, with a name as in `backend`; memory and cores are those that this process may use."""

    backend: str
    name: str
    memory_bytes: int
    cores: int


def device() -> Device:
    """Return MLX's device. The memory is that of an NVIDIA GPU, or of the machine within the control group's limit."""
    import mlx.core as mx

    info = mx.device_info(mx.default_device())
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = int(info.get("memory_size") or info.get("total_memory") or installed)
    if backend() != "cuda":
        memory = min(memory, memory_limit() or memory)
    return Device(backend(), name, memory, cores())


def backend() -> str:
    """Return the back end of MLX's default device: ``"metal"``, ``"cuda"`` or ``"cpu"``."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def driver() -> str:
    """Return the version of NVIDIA's driver, or an empty string if there is none."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(asked, stderr=subprocess.DEVNULL, text=True).strip().partition("\n")[0]
    return ""


def installed_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the installed version of each package; packages that are not installed are left out."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def mlx_wheels() -> dict[str, bool]:
    """Return the installed wheels of MLX's library, and whether the library file, which they share, is its own."""
    return {
        wheel: any(
            Path(str(file.locate())).stat().st_size == file.size for file in files(wheel) or () if file.stem == "libmlx"
        )
        for wheel in installed_versions(MLX_WHEELS)
    }
