"""The first call of CPU kernels: nothing is compiled before it, and a notice explains the wait."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import veloxlab
from veloxlab import progress, runtime
from veloxlab.widgets import Worker

on_cpu = pytest.mark.skipif(runtime.backend() != "cpu", reason="the loops are those of a CPU")
TOLD = "compiling loops for this processor: some seconds, once"
ENCODE = """
import veloxlab as vl, mlx.core as mx
from veloxlab.codecs import METHODS
codec = METHODS["qjl"].codec(32, 2, "keys")
mx.eval(list(codec.encode(mx.ones((1, 1, 8, 32))).arrays.values()))
"""


def python(code, **environment):
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "NUMBA_CACHE_DIR": "", **environment}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)


def test_no_compiler_is_imported_before_it_has_work():
    code = """
import sys
import veloxlab as vl
from tests.tiny_models import tiny
cache = vl.make_cache(tiny("llama"), "turboquant", bits=4)
print([name for name in ("numba", "llvmlite") if name in sys.modules])
"""
    assert python(code).stdout == "[]\n"


@on_cpu
def test_a_terminal_shows_the_notice_once_and_the_log_has_it_otherwise(tmp_path):
    """On a new machine, the folder of loops is empty. The second process compiles nothing and prints nothing.

    It does so where the package is installed again, at another path.
    """
    master, terminal = pty.openpty()
    shutil.copytree(Path(veloxlab.__file__).parent, tmp_path / "again" / "veloxlab")
    told = []
    environment = {**os.environ, "NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)}
    for place in (None, tmp_path / "again"):
        subprocess.run(
            [sys.executable, "-c", ENCODE], env=environment, cwd=place, check=True, stderr=terminal, timeout=120
        )
        os.set_blocking(master, False)
        try:
            told.append(os.read(master, 10_000).decode())
        except BlockingIOError:
            told.append("")
    os.close(terminal)
    os.close(master)
    assert told == [f"veloxlab: {TOLD}\r\n", ""]
    assert list((tmp_path / "veloxlab" / "loops").iterdir())


@on_cpu
def test_saved_output_has_no_notice_but_the_log_has_it(tmp_path):
    first = "import logging, sys\nlogging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
    done = python(first + ENCODE, XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr == ""
    assert done.stdout.count(TOLD) == 1


@on_cpu
def test_loops_run_without_a_writable_folder(tmp_path):
    no_folder = """
from numba.core import caching
for name, kind in vars(caching).items():
    if name.endswith("CacheImpl"):
        kind._locator_classes = []
"""
    said = "from veloxlab.kernels.checked import states\nprint(states())"
    assert python(no_folder + ENCODE + said, XDG_CACHE_HOME=str(tmp_path)).stdout == "{'agrees': 1}\n"
    assert list(tmp_path.iterdir()) == []


def test_notices_are_progress_of_the_waiting_step():
    worker, seen = Worker("test-notices"), []
    worker.watch(lambda status: seen.append((status.done, status.total, status.label)))

    def job(tell):
        tell(1, 3, "measuring")
        progress.notice(TOLD)
        tell(2, 3, "measuring")

    worker.submit("job", job)
    assert worker.wait(20)
    worker.close()
    assert [news for news in seen if news[1] == 3][:3] == [(1, 3, "measuring"), (1, 3, TOLD), (2, 3, "measuring")]


def test_notices_end_with_their_listener(caplog):
    heard: list[str] = []
    with caplog.at_level("INFO", "veloxlab.progress"):
        with progress.notices_to(heard.append):
            progress.notice("one")
        progress.notice("two of a test")
        progress.notice("two of a test")
    assert heard == ["one"]
    assert [record.message for record in caplog.records] == ["two of a test"]
