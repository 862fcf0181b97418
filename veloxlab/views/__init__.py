"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's.

A chart has a heading and the param ``caption``, the line below it: its argument ``caption``, or by default what the
function with ``_caption`` in its name says. Where layers lie side by side, the param ``picked_layer`` marks one.
"""

from types import FunctionType

import lazy_loader

from veloxlab.views import picture
from veloxlab.views.given import guarded

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """A chart or a caption, imported when it is first used, which refuses bad input in a sentence."""
    found = _public(name)
    if isinstance(found, FunctionType):
        found = globals()[name] = guarded(found)  # where `_public` left it without
    return found


picture.enable()
