"""Speculative decoding with compressed caches of draft and target, for `tests.surprises_in_use`.

The draft is SmolLM2 with weights of 4 bits, the target SmolLM2. Each decodes greedily, by mlx-lm's own functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step

from tests.surprises_results import model, with_weights_of_4_bits
from veloxlab.measure.activations import stretches
from veloxlab.mlxlm.probe import own_cache

TEXTS, PROMPT, ANSWER = 2, 256, 40
DRAFTED = 3  # drafted tokens for each check by the target, mlx-lm's default
EXACT = 16
SETTINGS: dict[str, dict[str, Any]] = {"usual": {}, "codes": {"window": 0, "chunk": "codes"}}
Row = dict[str, Any]


def made(net: Any, bits: int, read: str) -> list[Any]:
    return own_cache(net) if bits == EXACT else vl.make_cache(net, "turboquant", bits=bits, **SETTINGS[read])


@lru_cache
def prompt(part: int) -> mx.array:
    return mx.array(stretches(model()[1], None, PROMPT, TEXTS)[part])


@lru_cache
def alone(part: int, target: int, read: str) -> list[int]:
    """Return the target's own text, token by token."""
    net, _ = model()
    steps: Any = generate_step(prompt(part), net, max_tokens=ANSWER, prompt_cache=made(net, target, read))
    return [token for token, _ in steps]


def drafted(part: int, draft: int, target: int, read: str) -> Row:
    """Return the share of accepted drafts, and the first difference from the target's and the exact text, or null."""
    (net, _), drafting = model(), with_weights_of_4_bits()
    caches = made(net, target, read) + made(drafting, draft, read)
    options: dict[str, Any] = {"num_draft_tokens": DRAFTED, "max_tokens": ANSWER, "prompt_cache": caches}
    steps = [
        (token, from_draft)
        for token, _, from_draft in speculative_generate_step(prompt(part), net, drafting, **options)
    ]
    accepted, looks = sum(from_draft for _, from_draft in steps), sum(not from_draft for _, from_draft in steps)
    text = [token for token, _ in steps]
    own, exact = alone(part, target, read), alone(part, EXACT, read)
    return {
        "accepted": accepted / (DRAFTED * looks),
        "parted": next((i for i in range(ANSWER) if text[i] != own[i]), None),
        "left_exact": next((i for i in range(ANSWER) if text[i] != exact[i]), None),
    }


def _jobs() -> Iterator[Row]:
    """Yield the exact draft first, then a target that reads all tokens through codes, then drafts of fewer bits."""
    for part in range(TEXTS):
        for draft, read in ((EXACT, "usual"), (EXACT, "codes"), (4, "usual"), (2, "usual")):
            for target in (EXACT, 4, 2):
                if (target, read) != (EXACT, "codes"):  # it has no codes
                    yield {"part": part, "draft": draft, "target": target, "read": read}


drafts = _jobs, drafted
