"""FisherQuant's metric: gradients that estimate the Fisher matrix, clipped, damped, and of this version."""

import re
from dataclasses import replace
from io import StringIO
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import softmax

import veloxlab as vl
from tests.test_calibration import TEXT, Letters
from tests.tiny_models import tiny
from veloxlab.codecs import METHODS
from veloxlab.codecs.fisherquant_fitting import LONGEST, metric_of, shortened
from veloxlab.errors import InputError
from veloxlab.measure.derivative import Steps, drawn_gradients, signed_sum

SIZES = mx.array([10.0, 12.0, 14.0])  # of the logits of three positions that see one vector, all nearly certain
WEIGHTS = mx.random.normal((6, 4), key=mx.random.key(0))
VECTOR = mx.array([1.0, -0.5, 0.3, 0.8])
DRAWS = 1000
SAMPLING = np.sqrt(2 / DRAWS)  # the relative error of a mean of squares of Gaussians

VIEWS = (
    "Broadcast",
    "Reshape",
    "Transpose",
    "ExpandDims",
    "Flatten",
    "Unflatten",
    "Squeeze",
    "Slice",
    "CustomTransforms",
)
"""Operations that only describe an array anew."""


def logits(x):
    """Return logits of a linear model ``[N, 4]`` to ``[N · 3, 6]``."""
    return ((x @ WEIGHTS.T)[:, None] * SIZES[:, None]).reshape(-1, 6)


def exact_fisher():
    p = softmax(np.array(logits(VECTOR[None]), np.float64), axis=-1)
    matrices = np.array(SIZES[:, None, None] * WEIGHTS, np.float64)
    return sum(m.T @ (np.diag(q) - np.outer(q, q)) @ m for m, q in zip(matrices, p, strict=True))


def of_drawn_labels(z, key, _):
    """The method that `signed_sum` replaces."""
    labels = mx.random.categorical(mx.stop_gradient(z), key=key)[:, None]
    return (mx.logsumexp(z, axis=-1, keepdims=True) - mx.take_along_axis(z, labels, axis=-1)).sum()


def estimated(total):
    """Return the relative error of the mean of ggᵀ."""
    vectors = mx.broadcast_to(VECTOR, (DRAWS, 4))
    g = np.array(mx.grad(lambda x: total(logits(x), mx.random.key(3), Steps()))(vectors), np.float64)
    found, wanted = g.T @ g / DRAWS, exact_fisher()
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_random_signs_estimate_the_fisher_matrix_better_than_drawn_labels():
    """For one vector that three positions see: their gradients add up, and their cross terms average to zero."""
    assert estimated(signed_sum) < 2 * SAMPLING
    assert estimated(of_drawn_labels) > 5 * SAMPLING


def test_a_step_has_few_operations():
    """MLX starts about 100 in advance: two threads, of which each has one step, then leave room to each other."""
    run = drawn_gradients(tiny("llama"), Letters().encode(TEXT)[:300], mx.random.key(0))
    for step in chain(*run.forwards, *run.backwards):
        mx.export_to_dot(graph := StringIO(), step)
        names = re.findall(r'label ?= ?"(\w+)"', graph.getvalue())
        assert len([name for name in names if name not in VIEWS]) < 70
        mx.eval(step)


def test_the_longest_gradients_are_clipped_to_a_quantile():
    rng = np.random.default_rng(0)
    g = rng.standard_normal((2, 1000, 8)).astype(np.float32)
    g[0, 17] *= 1000
    found = shortened(g)
    lengths, before = (np.linalg.norm(x, axis=-1) for x in (found, g))
    assert lengths.max(axis=1) == pytest.approx(np.quantile(before, LONGEST, axis=1), rel=1e-5)
    kept = before < lengths.max(axis=1, keepdims=True)
    assert np.array_equal(found[kept], g[kept])
    assert np.allclose(found / lengths[..., None], g / before[..., None], atol=1e-6)  # directions stay
    ours, all_but_that = (metric_of(x[:1], x[:1], None) for x in (g, np.delete(g, 17, axis=1)))
    assert np.allclose(ours, all_but_that, rtol=0.05, atol=0.05)  # one token in 1,000 is clipped


def test_a_metric_is_damped_towards_its_mean():
    """Also of queries, without gradients; without any signal, all directions have equal cost."""
    g = np.zeros((1, 500, 4), np.float32)
    g[..., 0] = np.random.default_rng(0).choice([-2.0, 2.0], 500)
    queries = mx.array(g[None].repeat(2, axis=2).reshape(1, 2, 500, 4))
    for metric in (metric_of(g, g, None), metric_of(g, None, queries)):
        assert np.allclose(metric[0], np.diag([4.03, 0.03, 0.03, 0.03]))
    assert np.allclose(metric_of(g, 0 * g, None)[0], 0.03 * np.eye(4))


def test_gradients_and_calibrations_of_older_versions_are_not_used(tmp_path, monkeypatch):
    model, taken = tiny("llama"), []

    def counted(*given):
        taken.append(given)
        return drawn_gradients(*given)

    monkeypatch.setattr("veloxlab.measure.gradients.drawn_gradients", counted)

    def stop(done, total, label):
        if done == 2:
            raise KeyboardInterrupt

    def calibrate(folder, **given):
        return vl.calibrate(model, Letters(), "fisherquant", TEXT, tokens=1024, folder=tmp_path / folder, **given)

    method = METHODS["fisherquant"]
    with monkeypatch.context() as before:
        before.setitem(METHODS, "fisherquant", replace(method, version=6))
        old = calibrate("finished").save(tmp_path / "old")
        with pytest.raises(KeyboardInterrupt):  # both windows exist
            calibrate("stopped", progress=stop)
    with pytest.raises(InputError, match=f"codes of fisherquant of version 6, and here .* {method.version}"):
        vl.Calibration.load(old)
    assert len(taken) == 4
    calibrate("stopped")
    assert len(taken) == 6
