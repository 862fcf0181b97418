"""Notebook widgets: the laboratory and its pages, live charts, and long work with progress and cancel."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
