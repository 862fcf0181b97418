"""The reference notebook has every public name with its current docstring."""

import json

import pytest

from tests.reference import NOTEBOOK, ROOMS, names, notebook


@pytest.mark.parametrize(("prefix", "room"), [(prefix, room) for prefix, room, _ in ROOMS])
def test_every_public_name_is_in_the_reference(prefix, room):
    said = NOTEBOOK.read_text()
    assert [name for name in names(room) if f"### `{prefix}.{name}`" not in said] == []


def test_the_reference_equals_the_docstrings():
    """Run ``python -m tests.reference`` if this fails."""
    assert json.loads(NOTEBOOK.read_text()) == json.loads(notebook())
