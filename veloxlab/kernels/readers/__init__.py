"""How kernels read codes: one file for each layout that codes have."""

from veloxlab.kernels.readers.reader import Fragment, Reader, Room, Spread
from veloxlab.kernels.readers.table import TableReader

__all__ = ["Fragment", "Reader", "Room", "Spread", "TableReader"]
