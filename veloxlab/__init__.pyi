# Where the names at the top come from. `veloxlab/__init__.py` reads this file.
from . import allocate, codecs, measure, mlxlm, models, texts, views, widgets
from .allocate.ratequant import rate_budget
from .allocate.search import search
from .cache.calibration import Calibration
from .cache.make import load_cache, make_cache, save_cache
from .cache.plan import Plan
from .checkup import doctor
from .codecs import methods, register
from .errors import InputError
from .measure.activations import capture
from .measure.advise import advise
from .measure.calibrate import calibrate
from .measure.memory import report
from .measure.quality import fidelity
from .measure.tasks import evaluate
from .models.loading import load
from .widgets.lab import Lab

__all__ = [
    "Calibration",
    "InputError",
    "Lab",
    "Plan",
    "advise",
    "allocate",
    "calibrate",
    "capture",
    "codecs",
    "doctor",
    "evaluate",
    "fidelity",
    "load",
    "load_cache",
    "make_cache",
    "measure",
    "methods",
    "mlxlm",
    "models",
    "rate_budget",
    "register",
    "report",
    "save_cache",
    "search",
    "texts",
    "views",
    "widgets",
]
