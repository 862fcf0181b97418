"""Everything that touches mlx-lm: hooks, the dry run of a model, and the identity of models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
