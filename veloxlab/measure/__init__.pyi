# Where the names of `vl.measure` come from. `veloxlab/measure/__init__.py` reads this file.
from .activations import Capture, LayerCapture, capture
from .errors import layer_errors, relative_errors, token_errors
from .generation import first_parting, passkey, side_by_side
from .memory import code_bits, memory_growth, predicted_growth, report
from .paired import by_window, difference
from .planned_memory import largest_contexts, plan_memory
from .quality import Reference, fidelity, fidelity_to, reference
from .questions import Question, Task
from .times import layer_times

__all__ = [
    "Capture",
    "LayerCapture",
    "Question",
    "Reference",
    "Task",
    "by_window",
    "capture",
    "code_bits",
    "difference",
    "fidelity",
    "fidelity_to",
    "first_parting",
    "largest_contexts",
    "layer_errors",
    "layer_times",
    "memory_growth",
    "passkey",
    "plan_memory",
    "predicted_growth",
    "reference",
    "relative_errors",
    "report",
    "side_by_side",
    "token_errors",
]
