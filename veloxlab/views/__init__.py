"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's."""

from veloxlab.views import theme
from veloxlab.views.bits import bit_allocation, bit_caption
from veloxlab.views.errors import error_caption, error_domain, error_map
from veloxlab.views.fidelity import fidelity_caption, frontier
from veloxlab.views.generation import passkey_caption, passkey_map, strip_caption, token_strip
from veloxlab.views.kernels import attention_times, times_caption
from veloxlab.views.lengths import costs_by_length, lengths_caption
from veloxlab.views.memory import memory_caption, memory_growth
from veloxlab.views.memory_plan import memory_plan, plan_caption

__all__ = [
    "attention_times",
    "bit_allocation",
    "bit_caption",
    "costs_by_length",
    "error_caption",
    "error_domain",
    "error_map",
    "fidelity_caption",
    "frontier",
    "lengths_caption",
    "memory_caption",
    "memory_growth",
    "memory_plan",
    "passkey_caption",
    "passkey_map",
    "plan_caption",
    "strip_caption",
    "times_caption",
    "token_strip",
]

theme.enable()
