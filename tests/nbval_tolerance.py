"""A pytest plugin that makes nbval compare floating-point numbers with a tolerance, in text and in chart specs.

It is loaded with ``-p tests.nbval_tolerance``, because a conftest would cover only one of tests/ and notebooks/.
nbval passes every output through the undocumented ``IPyNbCell.sanitize`` and compares the results with ``!=``. The
plugin wraps that method to return values that compare with a tolerance. So the version of nbval is pinned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

from tests import environment  # noqa: F401 - first

# isort: split
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile


class Tolerance(NamedTuple):
    """Allowed difference of two numbers: this share of the larger, or this absolute value."""

    relative: float
    absolute: float


# The error of one head differs by 1.4e-3 between OpenBLAS's kernels for an Intel and an AMD processor, and a number
# of three digits by as much as its rounding.
FINE = Tolerance(2e-3, 1e-6)
# A cell with this tag shows a cache's effect on predictions, or codebooks that the notebook trains. The
# BLAS kernels of another CPU round differently, which changes codes; over 256 tokens KL changes by 15 % and flips by
# 0.016 (measured with OPENBLAS_CORETYPE=Haswell).
ROUGH_TAG, ROUGH = "rounding-sensitive", Tolerance(0.3, 0.02)
DECIMAL = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?")  # integers stay exact
HASHED_NAME = re.compile(r"data-[0-9a-f]{32}")  # Altair's name of a dataset; it changes with any bit
PICTURES = ("image/png", "image/svg+xml")  # they vary with the fonts of a machine


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave pictures out of the comparison."""
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += PICTURES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make every cell of a notebook compare with a tolerance."""
    for item in items:
        if isinstance(item, IPyNbCell):
            tags = item.cell.metadata.get("tags", [])
            item.sanitize = tolerant(item.sanitize, ROUGH if ROUGH_TAG in tags else FINE)


def tolerant(sanitize: Callable[[str], str], tolerance: Tolerance = FINE) -> Callable[[object], object]:
    """Wrap nbval's ``sanitize``, so that its results compare with a tolerance."""

    def comparable(output: object) -> object:
        if isinstance(output, dict):
            return TolerantSpec(with_numbered_datasets(output), tolerance)
        return TolerantText(sanitize(output), tolerance) if isinstance(output, str) else output

    return comparable


class TolerantText(str):
    """Text in which decimal numbers are equal if they are close."""

    __hash__ = str.__hash__

    def __new__(cls, text: str, tolerance: Tolerance = FINE) -> Self:
        self = super().__new__(cls, text)
        self.tolerance = tolerance  # type: ignore[attr-defined]
        return self

    def __eq__(self, other: object) -> bool:
        return close(str(self), other, self.tolerance)  # type: ignore[attr-defined]

    def __ne__(self, other: object) -> bool:
        return not self == other


class TolerantSpec(dict[str, Any]):
    """JSON in which floats, and decimal numbers inside strings, are equal if they are close."""

    __hash__ = None

    def __init__(self, spec: dict[str, Any], tolerance: Tolerance = FINE) -> None:
        super().__init__(spec)
        self.tolerance = tolerance

    def __eq__(self, other: object) -> bool:
        return close(dict(self), other, self.tolerance)

    def __ne__(self, other: object) -> bool:
        return not self == other


def close(a: object, b: object, tolerance: Tolerance = FINE) -> bool:
    """Return whether two trees of JSON are equal except for noise in their floats."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, str) and isinstance(b, str):
        return DECIMAL.sub("#", a) == DECIMAL.sub("#", b) and close(decimals(a), decimals(b), tolerance)
    if isinstance(a, int | float) and isinstance(b, int | float) and float in (type(a), type(b)):
        return math.isclose(a, b, rel_tol=tolerance.relative, abs_tol=tolerance.absolute)
    return a == b


def decimals(text: str) -> list[float]:
    """Read the decimal numbers in a text, from left to right."""
    return [float(number) for number in DECIMAL.findall(text)]


def with_numbered_datasets(spec: dict[str, Any]) -> dict[str, Any]:
    """Number the datasets that Altair names by a hash, in the order in which the spec refers to them."""
    rest = {key: value for key, value in spec.items() if key != "datasets"}
    hashed = dict.fromkeys(text for text in strings(rest) if HASHED_NAME.fullmatch(text))
    numbered: dict[str, Any] = renamed(spec, {name: f"data-{number}" for number, name in enumerate(hashed)})
    return numbered


def strings(tree: object) -> Iterator[str]:
    """Yield the strings of a tree in the order of sorted keys: a saved notebook has sorted keys, a kernel does not."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from strings(tree[key])
    elif isinstance(tree, list):
        for value in tree:
            yield from strings(value)
    elif isinstance(tree, str):
        yield tree


def renamed(tree: Any, names: dict[str, str]) -> Any:
    """Rename strings and keys throughout a tree."""
    if isinstance(tree, dict):
        return {names.get(key, key): renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [renamed(value, names) for value in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree
