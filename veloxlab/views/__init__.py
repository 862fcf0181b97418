"""Charts as pure functions: a Polars frame in, an Altair chart out. The import sets our theme and renderer in Altair.

A chart has a heading and the param ``caption``, the line below the heading: the argument ``caption``, or by default
the text of the function with ``_caption`` in its name. In charts by layer, the param ``picked_layer`` marks one layer.
"""

from types import FunctionType

import lazy_loader

from veloxlab.views import picture
from veloxlab.views.given import guarded

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Import a chart or a caption function at its first use, and add the checks of its arguments (`InputError`)."""
    found = _public(name)
    if isinstance(found, FunctionType):
        found = globals()[name] = guarded(found)  # replaces the function without checks
    return found


picture.enable()
