"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's."""

from veloxlab.views import theme
from veloxlab.views.allocation import (
    allocation_caption,
    allocation_map,
    budget_frontier,
    frontier_rows,
    loss_by_layer,
    loss_caption,
    sensitivity_by_layer,
    sensitivity_caption,
)
from veloxlab.views.attention_map import attention_caption, attention_maps
from veloxlab.views.bits import bit_allocation, bit_caption, coordinate_caption, coordinate_map
from veloxlab.views.channels import channel_map, channel_map_caption, outlier_caption, outliers_by_layer
from veloxlab.views.distributions import (
    angle_caption,
    angle_densities,
    channel_caption,
    channel_ranges,
    density,
    density_caption,
    levels_caption,
    levels_on_density,
)
from veloxlab.views.errors import (
    by_bits_caption,
    distribution_caption,
    error_caption,
    error_distribution,
    error_domain,
    error_map,
    errors_along_position,
    errors_by_bits,
    profile_caption,
)
from veloxlab.views.frontier import fidelity_caption, frontier, pareto_caption, pareto_front
from veloxlab.views.generation import (
    held_caption,
    held_while_generating,
    passkey_caption,
    passkey_map,
    strip_caption,
    token_strip,
)
from veloxlab.views.memory import memory_caption, memory_growth, memory_plan, plan_caption
from veloxlab.views.spectrum import (
    dimensions_by_layer,
    dimensions_caption,
    pair_caption,
    pair_energy,
    pair_turns,
    spectrum,
    spectrum_caption,
)
from veloxlab.views.speed import attention_times, costs_by_length, lengths_caption, times_caption

__all__ = [
    "allocation_caption",
    "allocation_map",
    "angle_caption",
    "angle_densities",
    "attention_caption",
    "attention_maps",
    "attention_times",
    "bit_allocation",
    "bit_caption",
    "budget_frontier",
    "by_bits_caption",
    "channel_caption",
    "channel_map",
    "channel_map_caption",
    "channel_ranges",
    "coordinate_caption",
    "coordinate_map",
    "costs_by_length",
    "density",
    "density_caption",
    "dimensions_by_layer",
    "dimensions_caption",
    "distribution_caption",
    "error_caption",
    "error_distribution",
    "error_domain",
    "error_map",
    "errors_along_position",
    "errors_by_bits",
    "fidelity_caption",
    "frontier",
    "frontier_rows",
    "held_caption",
    "held_while_generating",
    "lengths_caption",
    "levels_caption",
    "levels_on_density",
    "loss_by_layer",
    "loss_caption",
    "memory_caption",
    "memory_growth",
    "memory_plan",
    "outlier_caption",
    "outliers_by_layer",
    "pair_caption",
    "pair_energy",
    "pair_turns",
    "pareto_caption",
    "pareto_front",
    "passkey_caption",
    "passkey_map",
    "plan_caption",
    "profile_caption",
    "sensitivity_by_layer",
    "sensitivity_caption",
    "spectrum",
    "spectrum_caption",
    "strip_caption",
    "times_caption",
    "token_strip",
]

theme.enable()
