"""Files are written completely or not at all, and are checked when they are read; no long work is lost."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest

import veloxlab as vl
from tests.faults.writes import read_only
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab import store
from veloxlab.allocate.budget import PlannedModel
from veloxlab.allocate.ratequant import kept_rate_budget
from veloxlab.allocate.search import SEARCHED, SearchResult
from veloxlab.errors import InputError


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def found():
    """Return a search result."""
    rows = [
        (i, "turboquant", 2 + i, 4, 4, 0, [0, -1][:i], 100.5 + 9.25 * i, 3, 0.3 / (i + 1), 0.1, 0.4, 0.02, 1.5, "front")
        for i in range(3)
    ]
    shape = PlannedModel("llama of 2 layers", "0123456789ab", 2, 32)
    return SearchResult(pl.DataFrame(rows, schema=SEARCHED, orient="row"), shape, {}, {"tokens": 40})


@contextmanager
def full_disk():
    """No file can grow: every write fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


# places that cannot be written ----------------------------------------------------------------------------------------


def saves(model, found):
    """Return functions that save each kind of file."""
    plan = vl.Plan.uniform(model)
    calibration = vl.Calibration("turboquant", {}, {})
    return {"plan": plan.save, "search": found.save, "calibration": calibration.save}


@pytest.mark.parametrize("kind", ["plan", "search", "calibration"])
def test_an_impossible_place_is_reported_in_one_sentence(model, found, tmp_path, kind):
    save = saves(model, found)[kind]
    (tmp_path / "name.json").mkdir()
    (tmp_path / "name.safetensors").mkdir()
    with pytest.raises(InputError, match=r"name.\w+ is a folder: give the name of a file in it\."):
        save(tmp_path / "name.json")
    (tmp_path / "file").write_text("")
    for folder in ("none", "file"):
        with pytest.raises(InputError, match=rf"There is no folder .*{folder}: make it, or choose another\."):
            save(tmp_path / folder / "plan.json")
    with full_disk(), pytest.raises(InputError, match=r"full\.\w+ cannot be written \(.+\): choose another place\."):
        save(tmp_path / "full.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "name.json", "name.safetensors"]


def test_a_folder_without_permission_is_not_called_missing(found, tmp_path):
    closed = tmp_path / "closed"
    (closed / "in").mkdir(parents=True)
    closed.chmod(0)
    with (
        read_only(tmp_path),
        pytest.raises(InputError, match=r"cannot be written \(Permission denied\): choose another"),
    ):
        found.save(closed / "in" / "search.parquet")
    closed.chmod(0o755)


def test_a_full_disk_keeps_the_old_file(found, tmp_path):
    path = found.save(tmp_path / "search.parquet")
    whole = path.read_bytes()
    with full_disk(), pytest.raises(InputError, match="cannot be written"):
        found.save(path)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_reported_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(InputError, match=r"The folder .*file.* cannot be made \(.+\): choose another place\."):
            store.make_folder(folder)
    with full_disk():
        assert store.make_folder(tmp_path / "new" / "one").is_dir()
    with pytest.raises(InputError, match="is a folder: give the name"):
        store.check_place(tmp_path)
    store.check_place(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


# finished work --------------------------------------------------------------------------------------------------------

LONG = {
    "calibrate": lambda model, folder: (
        vl.calibrate(model, Letters(), "turboquant", TEXT, bits=3, tokens=64, folder=folder, outliers=8).frame
    ),
    "sensitivities": lambda model, folder: vl.allocate.sensitivities(
        model, Letters(), TEXT, sequences=1, tokens=24, by="key_norm", folder=folder
    ),
    "rates": lambda model, folder: (
        kept_rate_budget(
            model, Letters(), folder=folder, text=TEXT, bits=(2, 3), sequences=1, tokens=24, by="key_norm"
        ).curves
    ),
}


@pytest.mark.parametrize("work", LONG)
def test_results_that_cannot_be_saved_are_returned_with_a_warning(model, tmp_path, work):
    kept = LONG[work](model, tmp_path / "good")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give the path of a folder"):  # before the work
        LONG[work](model, tmp_path / "file")
    with pytest.warns(UserWarning, match=r"The folder .*new cannot be made .* The result is returned, but not saved\."):
        assert LONG[work](model, tmp_path / "file" / "new").equals(kept)
    with (
        full_disk(),
        pytest.warns(UserWarning, match=r"cannot be written \(.+\): .* The result is returned, but not saved\."),
    ):
        assert LONG[work](model, tmp_path / "full").equals(kept)
    assert list((tmp_path / "full").iterdir()) == []


def test_an_unfinished_run_continues_if_it_cannot_be_saved(tmp_path):
    (tmp_path / "file").write_text("")
    run = store.Unfinished(tmp_path / "file" / "run.json", "a run", {})
    with pytest.warns(UserWarning, match="The folder .* cannot be made .* The run continues"):
        run.put([1])
    run.put([1, 2])  # a second warning would be an error


def test_an_error_that_quotes_the_file_is_cut_short(tmp_path):
    with pytest.raises(InputError) as told, store.reading("plan", tmp_path / "plan.json", "save it again"):
        raise ValueError("last read:\n" + "x" * 10_000)
    said = str(told.value)
    assert said.startswith(f"The plan {tmp_path}/plan.json cannot be read (last read: xxx")
    assert said.endswith("xxx…): save it again.")
    assert "\n" not in said
    assert len(said) < 400


# files of a killed process -----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from veloxlab import store
Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
folder = Path(sys.argv[1])
store.write_together({folder / "one": b"new", folder / "two": b"new"})
"""


def test_the_next_write_removes_files_of_a_killed_one_and_keeps_files_in_progress(tmp_path):
    store.write_together({tmp_path / "one": b"old", tmp_path / "two": b"old"})
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = set(tmp_path.iterdir()) - {tmp_path / "one", tmp_path / "two"}
    assert len(left) == 2
    with store._part_in(tmp_path) as (part, _):
        store.write_atomically(tmp_path / "three", b"")
        assert part.exists()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "old", "two": "old", "three": ""}


def test_files_have_the_permissions_of_the_user_s_umask(tmp_path):
    before = os.umask(0o027)
    try:
        store.write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


# checksums ------------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_of_a_search_is_detected_anywhere(found, tmp_path):
    path = found.save(tmp_path / "search.parquet")
    whole = path.read_bytes()
    assert SearchResult.load(path).frame.equals(found.frame)
    assert pl.read_parquet(path).equals(found.frame)  # it is ordinary Parquet
    rng = np.random.default_rng(0)
    for place in [0, len(whole) - 1, *rng.integers(len(whole), size=200)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot be read \(.*checksum does not match\): make it again"):
            SearchResult.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        SearchResult.load(path)


def test_a_parquet_file_of_another_format_is_refused(tmp_path):
    frame = pl.DataFrame({"text": ["sha256:" + "0" * 64]})
    store.write_parquet(tmp_path / "some.parquet", frame, "one", {"a": 1})
    assert store.read_parquet(tmp_path / "some.parquet", "one")[1] == {"a": 1}
    with pytest.raises(ValueError, match="it is not of the format 'two'"):
        store.read_parquet(tmp_path / "some.parquet", "two")
