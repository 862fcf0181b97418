"""Names moved from the top still work there for one version, with a warning."""

import inspect

import pytest

import veloxlab as vl

MOVED = [(name, module) for module, names in vl._MOVED.items() for name in names.split()]  # type: ignore[attr-defined]


def test_no_more_than_twenty_names_are_at_the_top():
    assert len([name for name in vl.__all__ if not inspect.ismodule(getattr(vl, name))]) <= 20


@pytest.mark.parametrize(("name", "module"), MOVED)
def test_an_old_name_warns_and_is_the_new_one(name, module):
    with pytest.warns(DeprecationWarning, match=rf"vl\.{name} is now vl\.{module}\."):
        old = getattr(vl, name)
    assert old is getattr(getattr(vl, module), {"judge": "fidelity_to"}.get(name, name))
    assert name not in vl.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        vl.no_such_name  # type: ignore[attr-defined] # noqa: B018 - looking it up is the test
