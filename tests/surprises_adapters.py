"""Adapters of mlx-lm and calibrations of the base, for `tests.surprises_in_use`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import veloxlab as vl  # isort: skip - before mlx, so that MLX finds a fast BLAS

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.surprises_results import model
from veloxlab.errors import InputError
from veloxlab.measure.activations import first_tokens, stretches
from veloxlab.measure.quality import Reference, divergence, fidelity_to
from veloxlab.mlxlm.identity import fingerprint
from veloxlab.texts import excerpt

STRETCHES, TOKENS = 3, 256
LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
STEPS, STEP_TOKENS, RATE = 16, 128, 1e-4  # of training
RANDOM = 0.02  # standard deviation of a random adapter's second matrix
METHODS: dict[str, dict[str, Any]] = {
    "spectralquant": {"bits": 3, "tokens": 1024},
    "fisherquant": {"bits": 2, "tokens": 2048},  # an eighth of its usual text
}
Row = dict[str, Any]


@lru_cache
def adapted(kind: str) -> Any:
    """Return SmolLM2 with an adapter in all layers: trained on code for some steps, random, or trained and fused."""
    if kind == "base":
        return model()[0]
    net, tokenizer = vl.load("smollm2-135m", dtype="float32")
    net.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(net, len(net.layers), LORA)
    if kind == "random":
        for _, module in _adapters(net):
            module.lora_b = RANDOM * mx.random.normal(module.lora_b.shape)
    elif kind == "trained":
        _train(net, first_tokens(tokenizer, excerpt("calibration"), STEPS * STEP_TOKENS))
    else:
        net.update(adapted("trained").trainable_parameters())
        net.update_modules(tree_unflatten([(name, module.fuse()) for name, module in _adapters(net)]))
    mx.eval(net)
    return net


def _adapters(net: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in net.named_modules() if hasattr(module, "fuse")]


def _train(net: Any, ids: list[int]) -> None:
    def loss(net: Any, read: mx.array) -> mx.array:
        return nn.losses.cross_entropy(net(read[:, :-1]), read[:, 1:], reduction="mean")

    optimizer, step = optimizers.Adam(learning_rate=RATE), nn.value_and_grad(net, loss)
    for start in range(0, len(ids), STEP_TOKENS):
        value, gradients = step(net, mx.array([ids[start : start + STEP_TOKENS]]))
        optimizer.update(net, gradients)
        mx.eval(net, optimizer.state)
        print(f"  training: {value.item():.3f} nats a token", flush=True)


@lru_cache
def exact(kind: str) -> Reference:
    return Reference.of(adapted(kind), stretches(model()[1], None, TOKENS, STRETCHES))


@lru_cache
def calibration(kind: str, method: str) -> vl.Calibration:
    net, tokenizer = adapted(kind), model()[1]
    return vl.calibrate(net, tokenizer, method, **METHODS[method])


def moved(kind: str) -> Row:
    """Return the divergence that the adapter causes in the base's predictions, in nats, for each window."""
    both = zip(exact("base").log_probs, exact(kind).log_probs, strict=True)
    return {"kl": [divergence(one, other).mean().item() for one, other in both]}


def adapter(kind: str, method: str, calibrated: str) -> Row:
    """Return the loss in each window, against the adapted model's exact cache, and the warning on a calibration."""
    if not method:
        return moved(kind)
    net, fitted = adapted(kind), calibration(calibrated, method)
    bits, refused = METHODS[method]["bits"], ""
    try:
        fitted.check_model(net)
    except InputError as error:
        refused = str(error)
        fitted = replace(fitted, facts={**fitted.facts, "model": fingerprint(net)})
    make = partial(
        vl.make_cache, method_or_plan=method, bits=bits, calibration=fitted, sinks=4, window=0, chunk="codes"
    )
    frame = fidelity_to(exact(kind), make, per_token=True)
    kl = frame.group_by("window", maintain_order=True).mean()["kl"].to_list()
    return {"kl": kl, "refused": refused}


def _jobs() -> Iterator[Row]:
    for kind in ("random", "trained", "fused"):
        yield {"kind": kind, "method": "", "calibrated": ""}
    for method, kind in product(METHODS, ("base", "random", "trained", "fused")):
        for calibrated in dict.fromkeys(("base", "trained" if kind == "fused" else kind)):
            yield {"kind": kind, "method": method, "calibrated": calibrated}


adapters = _jobs, adapter
