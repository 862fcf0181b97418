"""CPU loops encode, decode and attend to every option of every method, except for listed ones."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import pytest

from tests.test_cpu_encode import normal
from veloxlab.cache.attention import History
from veloxlab.cache.expand import expanded
from veloxlab.cache.past import Segment
from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.rope import Rope
from veloxlab.kernels import checked, devices

pytestmark = pytest.mark.skipif(devices.current_backend() is not devices.CPU, reason="MLX computes on a GPU here")
DIM, HEADS = 64, 2
PROD, SCALES = {"variant": "prod"}, ["unbiased", "mse", "norm"]
# values of every option, or whole settings
ALL: Mapping[str, list[Any]] = {
    "rotation": ["hadamard", "haar"],
    "codebook": ["sphere", "gaussian"],
    "scale": SCALES,
    "sketch": ["gaussian", "orthogonal"],
    "seed": [1],
    "variant": ["mse", "prod"],
}
VALUES: Mapping[str, Mapping[str, Any]] = {
    "turboquant": {
        "sketch": [PROD | {"sketch": "gaussian"}, PROD | {"sketch": "orthogonal", "rotation": "haar"}],
        "outliers": [8],
        "outlier_bits": [{"outliers": 8, "outlier_bits": 5, "rotation": "haar"}],
    },
    "rabitq": {
        "scale": SCALES[:2],
        "encoder": ["grid", "fast", "exact", {"encoder": "exact", "rotation": "haar", "bounds": True}],
        "bounds": [True],
        "centroid": [True, {"centroid": True, "rotation": "haar"}],
    },
    "rvq": {"variant": ["plain", "refined"], "residual": ["exact", "laplacian"]},
    "qjl": {"outliers": [4], "levels": ["centres", "ends"], "group": [24]},
    "polarquant": {
        "recursion": ["block", "full"],
        "codebook": ["offline", "online", "fitted"],
        "levels": [(2, 2), (8, 3, 8), (4, 3, 2, 1)],
    },
    "spectralquant": {"basis": ["pca", "query", "hadamard"], "centred": [False], "damping": [0.1]},
    "vecinfer": {"point": ["d1b4", "d2b8", "d4b12"], "smooth": [False], "hadamard": [False]},
    "commvq": {"stages": [3]},
    "ratequant": {
        "head_bits": [(3, 2), {"head_bits": (3, 2), "rotation": "haar"}, {"head_bits": (1, 2), "variant": "prod"}],
        "sketch": [PROD | {"sketch": "gaussian"}],
    },
    "fisherquant": {
        **{"code": ["trellis", "scalar"], "entries": [256, 1024], "metric": ["fisher", "pca", "none"]},
        **{"centre": ["rotated", "still", "none"], "planning": ["head", "none"], "scale": ["none"], "words": [12]},
        **{"basis": ["after_rope", "before_rope"], "positions": [512]},
    },
}
# settings without a loop: MLX operations decode them, and attend to them
UNREAD: list[Mapping[str, Any]] = [
    *(PROD, {"outliers": 4}, {"outliers": 8}, {"point": "d1b4"}, {"levels": (4, 3, 2, 1)}, {"basis": "before_rope"}),
]


def settings_of(method):
    yield {}
    for name in METHODS[method].options:
        values = VALUES[method].get(name) or ALL[name]
        yield from (value if isinstance(value, dict) else {name: value} for value in values)


CASES = [
    pytest.param(method, options, tensor, id=f"{method}-{tensor}-{options}")
    for method in METHODS
    if method != "none"
    for options in settings_of(method)
    for tensor in (("keys", "values") if method == "qjl" else ("keys",))
]


def loops(monkeypatch, work):
    """Return the names of the loops that take part in some work."""
    monkeypatch.setattr(checked, "_states", {})
    mx.eval(work())
    assert set(checked.states()) <= {"agrees"}
    return str([*checked._states])


@pytest.mark.parametrize(("method", "options", "tensor"), CASES)
def test_a_loop_does_the_work(monkeypatch, method, options, tensor):
    codec = METHODS[method].codec(DIM, METHODS[method].bits[1], tensor, **options)
    codec = codec.fit(Sample(normal(1, HEADS, 300, DIM), queries=normal(1, 4, 300, DIM, seed=1), rope=Rope(DIM)))
    code = codec.encode(normal(1, HEADS, 40, DIM, seed=2), 7)
    assert "cpu" in loops(monkeypatch, lambda: list(codec.encode(normal(1, HEADS, 40, DIM, seed=2), 7).arrays.values()))
    unread = any(some.items() <= options.items() for some in UNREAD) and tensor == "keys"
    history = History((Segment(codec, code, codec, code),))
    decoded = loops(monkeypatch, lambda: expanded([(codec, code)], mx.float32, slice(None), None))
    assert ("'expand'" in decoded) is not unread
    attended = loops(monkeypatch, lambda: history.attend(normal(1, 4, 1, DIM), 0.1, None))
    assert ("attend (" in attended) is not unread
