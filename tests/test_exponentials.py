"""The functions of gradients are those of their definitions, and so are their derivatives."""

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from scipy.special import expit

from veloxlab import runtime
from veloxlab.measure.exponentials import softmax, swiglu

EXACT = 1e-5  # an exponential is right to 5e-6, and the sum of few hundred to less


def rows(spread):
    return spread * mx.random.normal((5, 300), key=mx.random.key(0))


@pytest.mark.parametrize("spread", [0.1, 1, 30])
def test_terms_and_gradients_are_by_the_definition(spread):
    x, cotangent = rows(spread), mx.random.normal((5, 300), key=mx.random.key(1))
    wide, of_outputs = np.array(x, np.float64), np.array(cotangent, np.float64)
    terms = np.exp(wide - wide.max(axis=-1, keepdims=True))
    terms /= terms.sum(axis=-1, keepdims=True)
    (found,), (gradients,) = mx.vjp(softmax, [x], [cotangent])
    np.testing.assert_allclose(np.array(found), terms, rtol=EXACT, atol=1e-36)
    expected = terms * (of_outputs - (terms * of_outputs).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.array(gradients), expected, atol=EXACT * np.abs(expected).max())


@pytest.mark.parametrize("masked", [-np.inf, float(np.finfo(np.float32).min)])
def test_what_is_masked_has_no_weight(masked):
    weights = np.array(softmax(mx.array([[0.0, masked, 0.0, masked]], mx.float32)))
    np.testing.assert_allclose(weights, [[0.5, 0, 0.5, 0]], rtol=EXACT, atol=1e-37)


def test_a_nan_is_not_hidden():
    assert np.isnan(np.array(softmax(mx.array([[1.0, np.nan, 2.0]])))).all()


def test_a_gpu_takes_the_softmax_of_mlx(monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    assert mx.array_equal(softmax(rows(1)), mx.softmax(rows(1), axis=-1))


def test_swiglu_and_its_gradients_are_by_the_definition():
    """Also where an exponential would overflow."""
    gate = mx.concatenate([rows(3).reshape(-1), mx.linspace(-300, 300, 100)])
    x, cotangent = (mx.random.normal(gate.shape, key=mx.random.key(i)) for i in (1, 2))
    (found,), gradients = mx.vjp(swiglu, [gate, x], [cotangent])
    z, wide, of_outputs = (np.array(own, np.float64) for own in (gate, x, cotangent))
    share = expit(z)
    of_gate = of_outputs * wide * share * (1 + z * (1 - share))
    for ours, expected in zip([found, *gradients], [z * share * wide, of_gate, of_outputs * z * share], strict=True):
        np.testing.assert_allclose(np.array(ours), expected, rtol=EXACT, atol=EXACT)  # the last is for sums near zero
    assert mx.isnan(swiglu(mx.array([np.nan]), mx.array([1.0]))).item()


def test_swiglu_in_half_precision_or_on_a_gpu_is_that_of_mlx(monkeypatch):
    gate = rows(3)
    half = gate.astype(mx.bfloat16)
    assert mx.array_equal(swiglu(half, half), nn.silu(half) * half)
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    assert mx.array_equal(swiglu(gate, gate), nn.silu(gate) * gate)
