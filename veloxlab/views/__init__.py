"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's.

A chart has a heading and the param ``caption``, the line below it: its argument ``caption``, or by default what the
function with ``_caption`` in its name says. Where layers lie side by side, the param ``picked_layer`` marks one.
"""

import lazy_loader

from veloxlab.views import theme

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

theme.enable()
