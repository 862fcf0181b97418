"""Charts as pure functions, a Polars frame in and an Altair chart out. Importing this makes our theme Altair's.

A chart has a heading and the param ``caption``, the line below it: its argument ``caption``, or by default what the
function with ``_caption`` in its name says. Where layers lie side by side, the param ``picked_layer`` marks one.
"""

from veloxlab.views import theme
from veloxlab.views.allocation import allocation_caption as allocation_caption
from veloxlab.views.allocation import allocation_map as allocation_map
from veloxlab.views.allocation import budget_frontier as budget_frontier
from veloxlab.views.allocation import frontier_rows as frontier_rows
from veloxlab.views.allocation import loss_by_layer as loss_by_layer
from veloxlab.views.allocation import loss_caption as loss_caption
from veloxlab.views.allocation import sensitivity_by_layer as sensitivity_by_layer
from veloxlab.views.allocation import sensitivity_caption as sensitivity_caption
from veloxlab.views.attention_map import attention_caption as attention_caption
from veloxlab.views.attention_map import attention_maps as attention_maps
from veloxlab.views.bits import bit_allocation as bit_allocation
from veloxlab.views.bits import bit_caption as bit_caption
from veloxlab.views.bits import coordinate_caption as coordinate_caption
from veloxlab.views.bits import coordinate_map as coordinate_map
from veloxlab.views.channels import channel_map as channel_map
from veloxlab.views.channels import channel_map_caption as channel_map_caption
from veloxlab.views.channels import outlier_caption as outlier_caption
from veloxlab.views.channels import outliers_by_layer as outliers_by_layer
from veloxlab.views.distributions import angle_caption as angle_caption
from veloxlab.views.distributions import angle_densities as angle_densities
from veloxlab.views.distributions import channel_caption as channel_caption
from veloxlab.views.distributions import channel_ranges as channel_ranges
from veloxlab.views.distributions import density as density
from veloxlab.views.distributions import density_caption as density_caption
from veloxlab.views.distributions import levels_caption as levels_caption
from veloxlab.views.distributions import levels_on_density as levels_on_density
from veloxlab.views.errors import by_bits_caption as by_bits_caption
from veloxlab.views.errors import distribution_caption as distribution_caption
from veloxlab.views.errors import error_caption as error_caption
from veloxlab.views.errors import error_distribution as error_distribution
from veloxlab.views.errors import error_domain as error_domain
from veloxlab.views.errors import error_map as error_map
from veloxlab.views.errors import errors_along_position as errors_along_position
from veloxlab.views.errors import errors_by_bits as errors_by_bits
from veloxlab.views.errors import profile_caption as profile_caption
from veloxlab.views.frontier import fidelity_caption as fidelity_caption
from veloxlab.views.frontier import frontier as frontier
from veloxlab.views.frontier import pareto_caption as pareto_caption
from veloxlab.views.frontier import pareto_front as pareto_front
from veloxlab.views.generation import held_caption as held_caption
from veloxlab.views.generation import held_while_generating as held_while_generating
from veloxlab.views.generation import passkey_caption as passkey_caption
from veloxlab.views.generation import passkey_map as passkey_map
from veloxlab.views.generation import strip_caption as strip_caption
from veloxlab.views.generation import token_strip as token_strip
from veloxlab.views.memory import memory_caption as memory_caption
from veloxlab.views.memory import memory_growth as memory_growth
from veloxlab.views.memory import memory_plan as memory_plan
from veloxlab.views.memory import plan_caption as plan_caption
from veloxlab.views.spectrum import dimensions_by_layer as dimensions_by_layer
from veloxlab.views.spectrum import dimensions_caption as dimensions_caption
from veloxlab.views.spectrum import pair_caption as pair_caption
from veloxlab.views.spectrum import pair_energy as pair_energy
from veloxlab.views.spectrum import pair_turns as pair_turns
from veloxlab.views.spectrum import spectrum as spectrum
from veloxlab.views.spectrum import spectrum_caption as spectrum_caption
from veloxlab.views.speed import attention_times as attention_times
from veloxlab.views.speed import costs_by_length as costs_by_length
from veloxlab.views.speed import lengths_caption as lengths_caption
from veloxlab.views.speed import times_caption as times_caption

__all__ = sorted([name for name, thing in vars().items() if callable(thing)])  # what is imported above

theme.enable()
