"""Measurements of capture, errors, memory and quality. Results are Polars frames with documented columns."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
