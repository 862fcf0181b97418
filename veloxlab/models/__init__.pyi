# Where the names of `vl.models` come from. `veloxlab/models/__init__.py` reads this file.
from .loading import load
from .shapes import ModelShape

__all__ = ["ModelShape", "load"]
