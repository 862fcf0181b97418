"""The script for a GPU counts passed, failed and skipped tests, in any process."""

import json
import subprocess

import pytest

from tests import on_gpu

SUITE = """
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("number", range(5))
def test_numbers(number):
    assert number != 3


@pytest.mark.skip(reason="there is none")
def test_of_none(): ...
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    path = tmp_path / "test_some.py"
    path.write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a GPU\n")
    monkeypatch.chdir(tmp_path)
    return path


def test_a_process_that_dies_is_a_failure_of_its_tests(suite):
    suite.write_text(SUITE.replace("assert number != 3", "assert number < 3 or __import__('os')._exit(1)"))
    tests = [f"{suite.name}::test_numbers[{number}]" for number in range(5)] + [f"{suite.name}::test_of_none"]
    found = on_gpu.parity(tests, 1)
    assert found["failed"] == ["ERROR 3 tests of this process gave no outcome (exit code 1)"] * 2


def test_every_comparison_is_counted_once_and_a_failure_is_reported(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "SUITE", suite)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: 6)  # type: ignore[attr-defined]  # four processes
    monkeypatch.setenv(on_gpu.COMMIT, "abc")
    benched, built = [], []
    monkeypatch.setattr(on_gpu, "build", lambda codes, processes: built.append((len(codes), processes)))
    monkeypatch.setattr(on_gpu.cli, "main", lambda words: benched.append(words) or 0)  # type: ignore[attr-defined]
    assert on_gpu.main([str(tmp_path / "out"), "--tokens", "64"]) == 1
    written = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert (written["passed"], written["skipped"]) == (4, 1)
    (failed,) = written["failed"]
    assert "test_numbers[3]" in failed
    assert "driver" in written["facts"]
    assert written["facts"]["commit"] == "abc"
    assert benched == [["bench", "--json", str(tmp_path / "out" / "bench.json"), "--tokens", "64"]]
    assert "4 passed, 1 failed, 1 skipped" in capsys.readouterr().out
    assert built == [(27, 4)]


def test_kernels_of_the_benchmarks_are_built_by_processes(tmp_path):
    codes = [next(code for code in on_gpu._attention() if name in code) for name in ("mlx_lm", "rabitq")]
    place = tmp_path / "done"
    on_gpu.build([*codes, f"from pathlib import Path; Path({str(place)!r}).touch()"], 1)
    assert place.exists()
    with pytest.raises(subprocess.CalledProcessError):
        on_gpu.build(["raise SystemExit(1)"], 2)
