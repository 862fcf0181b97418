"""Shared parts of all tests: the order of files, their marks, and the demo model, loaded once."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests import environment  # noqa: F401 - first
from veloxlab.runtime import cores

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Files of tests that take more than a few seconds together; all others are ``-m quick``.
SLOW = frozenset(
    [
        "advise",
        "allocate",
        "attention_kernels",
        "batch",
        "bench",
        "cache",
        "cache_file",
        "calibration",
        "codebooks",
        "codecs",
        "commands",
        "commvq",
        "compare",
        "cpu_attention",
        "cpu_encode",
        "cpu_expand",
        "cpu_first_call",
        "cuda_text",
        "encode_on_host",
        "expand_on_host",
        "families",
        "faults",
        "fisherquant",
        "fitting",
        "generation",
        "inputs",
        "integrate",
        "kernels_on_host",
        "key_explorer",
        "key_views",
        "lab",
        "lab_pages",
        "latents",
        "lifetime",
        "log_charts",
        "long_runs",
        "measure",
        "mlx_lm_contract",
        "nbval_tolerance",
        "notebooks",
        "on_gpu",
        "planned_memory",
        "planner",
        "prompt_file",
        "rabitq",
        "readers",
        "readers_on_host",
        "search",
        "serving",
        "slide_on_host",
        "stack",
        "sweep",
        "tasks",
        "tuner",
        "turboquant",
        "vecinfer",
        "views",
        "widget_pages",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick tests, and put long files first, so that no process waits long for another at the end."""
    files: dict[Path, dict[Path, int]] = {}
    for item in items:
        of_folder = files.setdefault(item.path.parent, {})
        of_folder.setdefault(item.path, len(of_folder))
    items.sort(key=lambda item: (_turn(item), files[item.path.parent][item.path]))
    for item in items:
        file = item.path
        if file.suffix == ".py" and file.parent.name == "tests" and file.stem.removeprefix("test_") not in SLOW:
            item.add_marker(pytest.mark.quick)


def _turn(item: pytest.Item) -> int:
    file = item.path
    if file.parent.name == "browser":
        return 0
    if file.suffix == ".ipynb":
        return 1
    return 2 if file.stem.removeprefix("test_") in SLOW else 3


class Blocks(LoadFileScheduling):
    """Each process runs one file at a time. One process runs all browser tests, so that the browser starts once."""

    def _split_scope(self, nodeid: str) -> str:
        return "browser" if nodeid.startswith("tests/browser/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use one process more than there are processors: the one with the browser waits for it most of the time."""
    return cores() + 1


@pytest.hookimpl(optionalhook=True)  # without xdist, as on a GPU machine, there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Blocks:
    """Distribute files to processes as `Blocks`."""
    return Blocks(config, log)


@pytest.fixture(scope="session")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for ``vl.calibrate``: tests with the same model and text share a calibration."""
    return tmp_path_factory.mktemp("calibrations")


@pytest.fixture(scope="session")
def smollm2() -> tuple[nn.Module, TokenizerWrapper]:
    """Return SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from veloxlab.models.loading import load

    return load("smollm2-135m", dtype="float32")


def pytest_collection_finish() -> None:
    """Exclude existing objects from garbage collection, which some tests run many times."""
    gc.collect()
    gc.freeze()
