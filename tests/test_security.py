"""Content of a file or a name stays data: no code runs, and no path leads out of its folder."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

import veloxlab as vl
from tests.tiny_models import tiny
from veloxlab.cli.measurements import results_name
from veloxlab.errors import InputError
from veloxlab.measure.reproduce import calibration_code, steps

PACKAGE = Path(vl.__file__).parent
RUNS_CODE = {"pickle", "dill", "joblib", "marshal", "shelve"}
RUNS_OWN_CELLS = {PACKAGE / "measure" / "reproduce.py"}  # a report runs its own notebook; see the next test
CODE = "from pathlib import Path\nPath(__file__).with_name('it_ran').touch()\n"


def test_no_module_reads_formats_that_can_run_code():
    """Neither by an import, nor by a call of eval or exec, nor by NumPy's pickles."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.partition(".")[0] for alias in node.names} & RUNS_CODE, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in RUNS_CODE, path
            elif isinstance(node, ast.Call):
                called = isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")
                assert not called or path in RUNS_OWN_CELLS, path
                assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, path


def test_arguments_of_a_report_are_literals_in_its_cells():
    plan = vl.Plan.uniform(tiny("llama"), "turboquant", bits=4)

    def calls(word):
        own = replace(plan, model=word)
        cells = steps(word, own, calibration_code(own, [Path("/", word)]), text=word, tasks=[word])
        nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.code))]
        return [ast.dump(node.func) for node in nodes if isinstance(node, ast.Call)]

    assert calls("plain")
    assert calls("x'); import os; print(\"\n") == calls("plain")


def test_a_model_s_folder_runs_no_code_without_the_user_s_permission(tmp_path):
    config = {"model_type": "llama", "model_file": "own.py", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(InputError, match="mlx-lm cannot load"):
        vl.load(tmp_path)
    with pytest.raises(InputError):
        vl.advise(tmp_path, memory="16 GB")
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("model", ["../../etc/passwd", "/etc/passwd", "some-one/../../x", "x/y.gguf", "C:..\\x"])
def test_a_model_s_name_is_a_file_name_without_a_folder(model):
    name = results_name(model)
    assert "/" not in name
    assert name not in ("", ".", "..")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a.b", "A"])
def test_a_method_s_id_is_no_path(name):
    with pytest.raises(InputError, match="is no id of a method"):
        vl.register(vl.codecs.Method(**{**vars(vl.codecs.METHODS["none"]), "id": name, "codecs": (int,)}))


def test_a_calibration_holds_no_path(tmp_path):
    """Its file is read as one, and contains no other file's name."""
    path = vl.Calibration("turboquant", {"version": 1, "options": {}}, {}).save(tmp_path / "one")
    assert vl.Calibration.load(path).codecs == {}
    assert [each.name for each in tmp_path.iterdir()] == ["one.safetensors"]
