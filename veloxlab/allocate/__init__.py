"""Allocation of bits to layers and heads: sensitivities, distortion curves, budgets, and the search over caches."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
