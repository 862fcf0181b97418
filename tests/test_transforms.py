"""Rotations are orthogonal for any head dimension, flat, and the same everywhere."""

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.parts.transforms import make_rotation
from veloxlab.errors import InputError

FLOAT32 = 2.0**-23
DIMS = [4, 7, 64, 72, 80, 96, 112, 128, 192, 256]


@pytest.mark.parametrize("name", ["hadamard", "haar"])
@pytest.mark.parametrize("dim", DIMS)
def test_a_rotation_keeps_inner_products_and_can_be_undone(name, dim):
    rotation = make_rotation(name, dim, seed=3)
    x = mx.random.normal((2, 5, dim), key=mx.random.key(dim))
    y = rotation.forward(x)
    # float32 rounding errors, relative to the vectors' lengths, add up at random: 5 and 1.2 steps measured
    length = mx.linalg.norm(x, axis=-1).max().item()
    assert np.allclose(y @ y.swapaxes(-1, -2), x @ x.swapaxes(-1, -2), rtol=0, atol=16 * FLOAT32 * length**2)
    assert np.allclose(rotation.inverse(y), x, rtol=0, atol=8 * FLOAT32 * length)


@pytest.mark.parametrize("dim", [*DIMS, 160, 224])
def test_only_powers_of_two_use_mlx_s_transform(monkeypatch, dim):
    """At 20·2^k and 28·2^k MLX's transform is not its own inverse, and it does not raise for every size it lacks."""
    sizes, theirs = [], mx.hadamard_transform

    def seen(x: mx.array) -> mx.array:
        sizes.append(x.shape[-1])
        return theirs(x)

    monkeypatch.setattr(mx, "hadamard_transform", seen)
    x = mx.random.normal((2, 5, dim), key=mx.random.key(dim))
    rotation = make_rotation("hadamard", dim, seed=3)
    assert np.allclose(rotation.inverse(rotation.forward(x)), x, rtol=0, atol=1e-4)  # a wrong inverse has an error of 1
    assert sizes
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize("dim", DIMS)
def test_a_single_outlier_channel_is_spread_over_all_coordinates(dim):
    turned = make_rotation("hadamard", dim, seed=0).forward(mx.eye(dim))
    # flat would be 1/√dim; the odd-sized Hartley factor adds at most √2
    assert mx.abs(turned).max().item() <= np.sqrt(2 / dim) + 1e-6


def test_haar_is_uniform_in_sign():
    """Without the correction by the signs of R's diagonal, the Q of a QR decomposition has a negative mean diagonal."""
    traces = [np.trace(np.array(make_rotation("haar", 8, seed).forward(mx.eye(8)))) for seed in range(400)]
    assert abs(np.mean(traces)) < 4 / np.sqrt(400)  # the trace of a Haar matrix has mean 0 and variance 1


def test_equal_seeds_give_equal_rotations_and_others_do_not():
    x = mx.ones((1, 64))
    first, again, other = (make_rotation("hadamard", 64, s).forward(x) for s in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)


def test_an_unknown_rotation_is_refused():
    with pytest.raises(InputError, match="give 'hadamard' or 'haar'"):
        make_rotation("fourier", 64, 0)
