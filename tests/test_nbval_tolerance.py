"""The tolerant comparison of notebook outputs: what passes, what fails, and that nbval uses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.execute_notebooks import NOTEBOOKS
from tests.nbval_tolerance import ROUGH_TAG, tolerant
from veloxlab.codecs.turboquant import TurboQuant

VEGA = "application/vnd.vegalite.v5+json"
LENGTH = 1.005  # factor of decoded vectors: at 2 bits and the unbiased scale it makes the squared error 1 % larger
LONGER = f"""
from veloxlab.codecs.turboquant import TurboQuant
decode = TurboQuant.decode
TurboQuant.decode = lambda codec, *given: {LENGTH} * decode(codec, *given)
"""
as_nbval = tolerant(lambda text: text.replace("0xabc", "0x…"))


def same(a: object, b: object) -> bool:
    """Compare as nbval does, with ``!=``, and check that ``==`` agrees."""
    differ = as_nbval(a) != as_nbval(b)
    assert differ is not (as_nbval(a) == as_nbval(b))
    return not differ


def chart(value: float, name: str = "0" * 32) -> dict[str, object]:
    return {
        "data": {"name": f"data-{name}"},
        "mark": "bar",
        "title": f"KL {value:.6f} nats",
        "datasets": {f"data-{name}": [{"layer": 3, "kl": value}]},
    }


@pytest.mark.parametrize("noise", [0.0, 1e-7, -1e-7])
def test_noise_passes_in_text_and_charts(noise):
    value = 0.25 * (1 + noise)
    assert same(f"kl {0.25!r}, 3 bits", f"kl {value!r}, 3 bits")
    assert same(chart(0.25), chart(value))


@pytest.mark.parametrize("change", [1e-2, -1e-2])
def test_change_of_one_percent_fails_in_text_and_charts(change):
    value = 0.25 * (1 + change)
    assert not same("kl 0.25", f"kl {value!r}")
    assert not same(chart(0.25), chart(value))
    assert not same({"kl": 0.25}, {"kl": value})


@pytest.mark.parametrize(("a", "b"), [("4096 bytes", "4097 bytes"), ({"bytes": 10**6}, {"bytes": 10**6 + 1})])
def test_integers_are_exact(a, b):
    assert same(a, a)
    assert not same(a, b)


def test_whole_float_equals_its_integer_in_json():
    """A kernel sends 1.0 where the saved notebook can have 1."""
    assert same({"bits": 1.0}, {"bits": 1})
    assert same({"bits": 1}, {"bits": 1.0000001})
    assert not same({"bits": 1}, {"bits": 1.01})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("layer 1.50", "layers 1.50"),
        ("1.50 2.50", "1.50"),
        ("nan", "1.50"),
        ({"a": 1.5}, {"b": 1.5}),
        ({"a": [1.5]}, {"a": [1.5, 1.5]}),
        ({"a": 1.5}, {"a": None}),
        ({"a": True}, {"a": "true"}),
    ],
)
def test_other_differences_fail(a, b):
    assert not same(a, b)


def test_negative_zero_is_zero():
    assert same("-0.0000", "0.0000")


def test_hashed_dataset_names_are_ignored():
    assert same(chart(0.5, "0" * 32), chart(0.5, "f" * 32))


def test_hashed_datasets_pair_by_use_and_not_by_name():
    """Saving sorts the names, so a last bit can change the order of two datasets."""

    def two_layers(bars: str, lines: str) -> dict[str, object]:
        layers = [{"data": {"name": name}} for name in (bars, lines)]
        return {"layer": layers, "datasets": dict(sorted({bars: [{"y": 1.5}], lines: [{"y": 9.5}]}.items()))}

    low, high = "data-" + "1" * 32, "data-" + "e" * 32
    assert same(two_layers(low, high), two_layers(high, low))


def test_given_dataset_names_count():
    assert not same({"data": {"name": "errors"}}, {"data": {"name": "bits"}})


def test_nbvals_own_patterns_still_apply():
    assert same("at 0xabc", "at 0x…")


def test_nbval_compares_with_the_tolerance(tmp_path):
    """A real run of nbval on cells with saved output that is right, noisy, wrong by 1 %, an image, and rough."""
    path = tmp_path / "cells.ipynb"
    nbformat.write(
        new_notebook(
            cells=[
                printing("print(0.25)", "0.25\n"),
                printing("print(0.25)", "0.25000001\n"),
                printing("print(0.25)", "0.2525\n"),
                drawing("<svg>one font</svg>"),
                printing("print(0.25)", "0.30\n", tags=[ROUGH_TAG]),
                printing("print(0.25)", "0.40\n", tags=[ROUGH_TAG]),
            ]
        ),
        path,
    )
    assert outcomes(path) == ["PASSED", "PASSED", "FAILED", "PASSED", "PASSED", "FAILED"]


def test_a_codec_that_loses_one_percent_more_fails_its_notebook(tmp_path):
    """TurboQuant's notebook up to its first table of numbers, in kernels where each decoded vector is too long."""
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "longer.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(LONGER)
    notebook = nbformat.read(NOTEBOOKS / "01_turboquant.ipynb", as_version=4)
    table = next(place for place, cell in enumerate(notebook.cells) if "loss, paper" in cell.source)
    notebook.cells = notebook.cells[: table + 1]
    nbformat.write(notebook, tmp_path / "longer.ipynb")
    assert outcomes(tmp_path / "longer.ipynb", IPYTHONDIR=str(tmp_path / "ipython")) == ["PASSED", "PASSED", "FAILED"]


def test_the_error_of_that_codec_is_one_percent_larger():
    codec = TurboQuant(64, 2)
    x = mx.random.normal((1, 1, 1000, 64), key=mx.random.key(0))
    decoded = codec.decode(codec.encode(x))
    loss, longer = (mx.square(y - x).sum().item() for y in (decoded, LENGTH * decoded))
    assert longer / loss == pytest.approx(1.01, abs=0.001)


def outcomes(path: Path, **environment: str) -> list[str]:
    """Return the result of a real run of nbval for each code cell of a notebook."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "tests.nbval_tolerance", "-v"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(path.parent), str(path)],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"::Cell \d (PASSED|FAILED) ", run.stdout)
    assert found, run.stdout + run.stderr
    return found


def printing(source, text, tags=()):
    outputs = [new_output("stream", name="stdout", text=text)]
    return new_code_cell(source, execution_count=1, outputs=outputs, metadata={"tags": list(tags)})


def drawing(saved):
    source = "from IPython.display import SVG; SVG('<svg>another font</svg>')"
    data = {"image/svg+xml": saved, "text/plain": "<IPython.core.display.SVG object>"}
    return new_code_cell(source, execution_count=1, outputs=[new_output("execute_result", data, execution_count=1)])
