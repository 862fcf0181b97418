"""How kernels read codes: one file for each layout that codes have."""

from veloxlab.kernels.readers.groups import GroupsReader
from veloxlab.kernels.readers.plan import PlanReader, planned
from veloxlab.kernels.readers.polar import PolarReader
from veloxlab.kernels.readers.reader import Fragment, Reader, Room, Spread
from veloxlab.kernels.readers.stages import StagesReader
from veloxlab.kernels.readers.sums import PairOrder, SumsReader
from veloxlab.kernels.readers.table import ShiftedTableReader, TableReader
from veloxlab.kernels.readers.widths import HeadWidths, WidthsReader

__all__ = [
    "Fragment",
    "GroupsReader",
    "HeadWidths",
    "PairOrder",
    "PlanReader",
    "PolarReader",
    "Reader",
    "Room",
    "ShiftedTableReader",
    "Spread",
    "StagesReader",
    "SumsReader",
    "TableReader",
    "WidthsReader",
    "planned",
]
