"""A pytest plugin that has nbval compare floating-point numbers with a tolerance, in text and in chart specs alike.

Loaded with ``-p tests.nbval_tolerance``: a conftest would serve one of the folders tests/ and notebooks/ only.
nbval passes every output through the undocumented ``IPyNbCell.sanitize`` and compares the results by ``!=``, so this
wraps that method to return values that compare with a tolerance. Hence the pinned version of nbval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

RELATIVE, ABSOLUTE = 1e-3, 1e-6
DECIMAL = re.compile(r"[-+]?\d+\.\d+(?:[eE][-+]?\d+)?")  # integers stay exact
HASHED_NAME = re.compile(r"data-[0-9a-f]{32}")  # what Altair calls a dataset: it changes with any last bit
PICTURES = ("image/png", "image/svg+xml")  # they vary with the fonts of a machine


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave pictures out of the comparison."""
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += PICTURES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every cell of a notebook compare with a tolerance."""
    for item in items:
        if isinstance(item, IPyNbCell):
            item.sanitize = tolerant(item.sanitize)


def tolerant(sanitize: Callable[[str], str]) -> Callable[[object], object]:
    """Wrap nbval's ``sanitize`` so that what it returns compares with a tolerance."""

    def comparable(output: object) -> object:
        if isinstance(output, dict):
            return TolerantSpec(with_numbered_datasets(output))
        return TolerantText(sanitize(output)) if isinstance(output, str) else output

    return comparable


class TolerantText(str):
    """Text in which decimal numbers are equal if they are close."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return close(str(self), other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class TolerantSpec(dict[str, Any]):
    """JSON in which floats, and decimal numbers inside strings, are equal if they are close."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return close(dict(self), other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def close(a: object, b: object) -> bool:
    """Tell whether two trees of JSON are the same but for noise in their floats."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, str) and isinstance(b, str):
        return DECIMAL.sub("#", a) == DECIMAL.sub("#", b) and all(map(close, decimals(a), decimals(b)))
    if isinstance(a, int | float) and isinstance(b, int | float) and float in (type(a), type(b)):
        return math.isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return a == b


def decimals(text: str) -> list[float]:
    """Read the decimal numbers in a text, from left to right."""
    return [float(number) for number in DECIMAL.findall(text)]


def with_numbered_datasets(spec: dict[str, Any]) -> dict[str, Any]:
    """Number the datasets that Altair named by a hash, in the order in which the spec refers to them."""
    rest = {key: value for key, value in spec.items() if key != "datasets"}
    hashed = dict.fromkeys(text for text in strings(rest) if HASHED_NAME.fullmatch(text))
    numbered: dict[str, Any] = renamed(spec, {name: f"data-{number}" for number, name in enumerate(hashed)})
    return numbered


def strings(tree: object) -> Iterator[str]:
    """Give the strings of a tree, in the order of the sorted keys: a saved notebook has sorted them, a kernel not."""
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
