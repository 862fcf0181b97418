"""All that touches mlx-lm: hooks, the dry run of a model, and what tells models apart."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
