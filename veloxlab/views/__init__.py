"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's."""

from veloxlab.views import theme
from veloxlab.views.allocation import allocation_caption, allocation_map, loss_by_layer, loss_caption
from veloxlab.views.bits import bit_allocation, bit_caption
from veloxlab.views.budget_frontier import budget_frontier, frontier_rows
from veloxlab.views.errors import error_caption, error_domain, error_map
from veloxlab.views.fidelity import fidelity_caption, frontier
from veloxlab.views.kernels import attention_times, times_caption
from veloxlab.views.lengths import costs_by_length, lengths_caption
from veloxlab.views.memory import memory_caption, memory_growth
from veloxlab.views.pareto import pareto_caption, pareto_front
from veloxlab.views.sensitivity import sensitivity_by_layer, sensitivity_caption

__all__ = [
    "allocation_caption",
    "allocation_map",
    "attention_times",
    "bit_allocation",
    "bit_caption",
    "budget_frontier",
    "costs_by_length",
    "error_caption",
    "error_domain",
    "error_map",
    "fidelity_caption",
    "frontier",
    "frontier_rows",
    "lengths_caption",
    "loss_by_layer",
    "loss_caption",
    "memory_caption",
    "memory_growth",
    "pareto_caption",
    "pareto_front",
    "sensitivity_by_layer",
    "sensitivity_caption",
    "times_caption",
]

theme.enable()
