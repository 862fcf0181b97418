"""Readers of codes for kernels: a class for each layout of codes."""

from veloxlab.kernels.readers.blocks import GroupsReader, PolarReader
from veloxlab.kernels.readers.reader import Fragment, Reader, Room
from veloxlab.kernels.readers.tables import SumsReader, TableReader
from veloxlab.kernels.readers.trellis import TrellisReader
from veloxlab.kernels.readers.widths import PlanReader, WidthsReader, head_widths, planned

__all__ = [
    "Fragment",
    "GroupsReader",
    "PlanReader",
    "PolarReader",
    "Reader",
    "Room",
    "SumsReader",
    "TableReader",
    "TrellisReader",
    "WidthsReader",
    "head_widths",
    "planned",
]
