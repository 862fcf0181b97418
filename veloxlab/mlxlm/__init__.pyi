# Where the names of `vl.mlxlm` come from. `veloxlab/mlxlm/__init__.py` reads this file.
from .hooks import detach

__all__ = ["detach"]
