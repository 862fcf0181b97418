"""Families with their own attention arithmetic read codes, and their original functions are restored by `detach`."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

import veloxlab as vl
from tests.tiny_models import stepwise, tiny
from veloxlab.cache.arithmetic import attend_exactly
from veloxlab.cache.attention import History
from veloxlab.cache.past import exact_codes, exact_segment
from veloxlab.measure.activations import capture_layers
from veloxlab.mlxlm import hooks, probe
from veloxlab.mlxlm.hooks import attach, detach

HISTORY = History((exact_segment(exact_codes(mx.zeros((2, 3, 5, 8)), mx.zeros((2, 3, 5, 8)))),))


def test_a_handle_states_shape_and_dtype_of_its_keys():
    assert HISTORY.shape == (2, 3, 5, 8)
    assert HISTORY.dtype == mx.float32
    assert HISTORY.astype(mx.float16) is HISTORY
    other = History((exact_segment(exact_codes(mx.zeros((2, 3, 5, 8)), mx.zeros((2, 3, 5, 4)))),))
    with pytest.raises(AttributeError, match="8 and values of 4"):
        _ = other.shape


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_a_cap_limits_logits_before_the_mask(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.standard_normal((1, heads, 20, 16), np.float32)).astype(dtype) for heads in (4, 2, 2))
    sinks = mx.array(rng.standard_normal(4, np.float32))
    scores = mx.tanh((q.astype(mx.float32) @ mx.repeat(k, 2, axis=1).swapaxes(-1, -2)) / 2) * 2
    scores = mx.where(mx.tri(20) > 0, scores, -mx.inf)
    scores = mx.concatenate([scores, mx.broadcast_to(sinks[None, :, None, None], (1, 4, 20, 1))], axis=-1)
    wanted = mx.softmax(scores, axis=-1)[..., :-1] @ mx.repeat(v, 2, axis=1)
    found = attend_exactly(q, k, v, 1.0, "causal", sinks, 2.0)
    assert found.dtype == dtype
    assert mx.abs(found - wanted).max() < (2e-3 if dtype == mx.float16 else 1e-5)


def test_gemma2_has_its_own_function_after_detach():
    model = tiny("gemma2")
    caches = vl.make_cache(model, bits=8)
    module = type(model.layers[0].self_attn)
    ours = module.__call__
    detach()
    own = module.__call__
    try:
        assert own is not ours
        ids = mx.array([[1, 2, 3]])
        native = model(ids, cache=probe.own_cache(model))
    finally:
        attach()
    assert module.__call__ is not own
    assert mx.array_equal(model(ids, cache=probe.own_cache(model)), native)  # with a cache of mlx-lm, the same
    assert caches[0].path == "codes"


@pytest.mark.parametrize("name", [name for name in hooks._OWN if name.endswith("Attention.__call__")])
def test_a_cache_of_another_library_is_left_to_mlx_lms_own_function(name):
    """Such a cache has no ``keys`` either, like a compressed cache."""
    assert hooks._OWN[name](lambda *given: "its own", "layer", "x", None, [object(), object()]) == "its own"


@pytest.mark.parametrize("chunks", [[40, 1, 1], [3, 20, 19]])
def test_gemma2_with_a_low_cap_keeps_its_logits(chunks):
    model, ids = tiny("gemma2", attn_logit_softcapping=0.05), [7 * i % 90 for i in range(42)]
    native = stepwise(model, ids, probe.own_cache(model), chunks)
    same = stepwise(model, ids, vl.make_cache(model, "none", sinks=2, window=8), chunks)
    free = stepwise(tiny("gemma2"), ids, probe.own_cache(model), chunks)
    assert np.abs(same - native).max() < 1e-4 * native.std()
    assert np.abs(free - native).max() > 1e-2 * native.std()


def test_a_capture_of_gemma2_equals_its_own_attention():
    model = tiny("gemma2", attn_logit_softcapping=0.05)
    (layer, *_) = capture_layers(model, list(range(1, 30)))
    assert layer.cap == 0.05
    assert mx.abs(layer.logits(layer.vectors("keys"))).max() <= 0.05


def test_swiglu_is_replaced_in_a_block_for_this_thread_and_restored_by_detach():
    model, ids = tiny("llama"), mx.array([[1, 2, 3]])
    detach()
    own = vars(llama)["swiglu"]
    attach()
    assert vars(llama)["swiglu"] is not own
    native = model(ids)
    with hooks.swiglu_by(lambda gate, x: gate * 0), ThreadPoolExecutor(1) as pool:
        assert not mx.allclose(model(ids), native)
        assert np.array_equal(pool.submit(lambda: np.array(model(ids))).result(), np.array(native))
    assert mx.array_equal(model(ids), native)
    detach()
    assert vars(llama)["swiglu"] is own
    attach()
