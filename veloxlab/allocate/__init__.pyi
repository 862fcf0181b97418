# Where the names of `vl.allocate` come from. `veloxlab/allocate/__init__.py` reads this file.
from .budget import AverageBits, Bounds, BytesPerToken, QualityFloor, TokensInMemory
from .ratequant import allocate_bits, distortion_curves, rate_budget
from .rates import RateBudget
from .search import SearchResult
from .sensitivity import sensitivities

__all__ = [
    "AverageBits",
    "Bounds",
    "BytesPerToken",
    "QualityFloor",
    "RateBudget",
    "SearchResult",
    "TokensInMemory",
    "allocate_bits",
    "distortion_curves",
    "rate_budget",
    "sensitivities",
]
