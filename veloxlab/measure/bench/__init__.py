"""Times on this device, compressed against exact and against mlx-lm's own quantized cache.

All rows of one call are of one run on one device, to be read as ratios.
"""

from veloxlab.measure.bench.attention import attention_of_methods, decode_attention, encode_steps
from veloxlab.measure.bench.models import decode_steps, read_prompts
from veloxlab.measure.bench.timing import facts

__all__ = [
    "attention_of_methods",
    "decode_attention",
    "decode_steps",
    "encode_steps",
    "facts",
    "read_prompts",
]
