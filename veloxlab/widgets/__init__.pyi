# The modules of the names in `vl.widgets`. `veloxlab/widgets/__init__.py` reads this file.
from .chart_view import ChartView, VegaRuntime, link
from .lab import Lab
from .pages.budget import BudgetTuner
from .pages.cache import CacheExplorer
from .pages.errors import ErrorExplorer
from .pages.generation import SideBySide
from .pages.keys import KeyExplorer
from .pages.memory import MemoryPlanner
from .pages.tasks import Tasks
from .progress_bar import ProgressBar
from .worker import Cancelled, Progress, Status, Worker

__all__ = [
    "BudgetTuner",
    "CacheExplorer",
    "Cancelled",
    "ChartView",
    "ErrorExplorer",
    "KeyExplorer",
    "Lab",
    "MemoryPlanner",
    "Progress",
    "ProgressBar",
    "SideBySide",
    "Status",
    "Tasks",
    "VegaRuntime",
    "Worker",
    "link",
]
