"""A method whose codes change their meaning gets another version; otherwise older files would decode to other numbers.

If this fails and the change is intended, raise ``version`` in the method's `Method` and write the new numbers here.
"""

import mlx.core as mx
import pytest

from veloxlab.codecs import METHODS
from veloxlab.codecs.base import Sample
from veloxlab.codecs.parts.rope import Rope

VECTOR, FIRST = 7, 4  # recorded numbers of one decoded vector
LIKE_THEN: dict[tuple[str, int], tuple[float, list[float] | None]] = {
    ("turboquant", 1): (0.008908, [-1.53, -0.41, -1.85, 0.49]),
    ("rvq", 1): (0.01743, [-1.38, -0.34, -2.03, 0.92]),
    ("vecinfer", 1): (0.007202, None),  # as for CommVQ below
    ("ratequant", 1): (0.008908, [-1.53, -0.41, -1.85, 0.49]),
    ("spectralquant", 1): (0.008315, [-1.51, -0.48, -1.88, 0.52]),
    ("rabitq", 1): (0.008833, [-1.31, -0.26, -1.83, 0.63]),
    ("qjl", 1): (0.139, [-1.1, -0.13, -1.85, 1.03]),
    ("polarquant", 1): (0.0326, [-1.38, -0.16, -1.85, 0.53]),
    ("commvq", 1): (0.04025, None),  # another processor's rounding changes the training
    ("fisherquant", 8): (0.006844, [-1.46, -0.37, -1.78, 0.55]),
    ("none", 1): (0, [-1.45, -0.36, -1.8, 0.55]),
}


def decoded(name: str) -> tuple[float, list[float]]:
    """Return the relative error of all keys of one seed, and the first numbers of one of them."""
    method = METHODS[name]
    codec = method.codec(64, 16 if name == "none" else 4, "keys")
    x, queries = (mx.random.normal((1, heads, 256, 64), key=mx.random.key(heads)) for heads in (2, 4))
    if method.calibrated:
        codec = codec.fit(Sample(x, queries, Rope(64), 0))
    back = codec.decode(codec.encode(x, 3)).astype(mx.float32)
    error = mx.square(back - x).mean() / mx.square(x).mean()
    return error.item(), back[0, 1, VECTOR, :FIRST].tolist()


@pytest.mark.parametrize("kernels", ["0", "1"])
@pytest.mark.parametrize("name", METHODS)
def test_codes_decode_to_the_recorded_numbers_of_this_version(name, kernels, monkeypatch):
    """With MLX operations, and with the device's kernels."""
    monkeypatch.setenv("VELOXLAB_KERNELS", kernels)
    error, numbers = decoded(name)
    then, noted = LIKE_THEN[name, METHODS[name].version]
    assert error == pytest.approx(then, rel=0.03)
    if noted is not None:
        assert numbers == pytest.approx(noted, abs=0.01)
