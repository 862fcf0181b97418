"""TurboQuant-RVQ's own numbers: two stages against one, on densities and on random vectors."""

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.cache.layer import CompressedKVCache
from veloxlab.codecs.base import Code
from veloxlab.codecs.parts.codebooks import gaussian_codebook, sphere_codebook
from veloxlab.codecs.rvq import METHOD, Rvq
from veloxlab.codecs.turboquant import TurboQuant
from veloxlab.errors import InputError

DIM = 128
VECTORS = 4_000
# relative squared error of two Gaussian stages of b/2 bits each: with VeloxQuant's second stage, and the best one
TABLE = {2: (0.1327, 0.1307), 4: (0.0236, 0.0197), 6: (0.00278, 0.0020)}
# the sampled table has at most 3 digits: half a unit of 0.0197 is 0.3 %, of 0.0020 it is 2.5 %
TABLE_TOLERANCE = {2: 0.005, 4: 0.005, 6: 0.03}


@pytest.fixture(scope="module")
def vectors():
    x = np.random.default_rng(0).standard_normal((1, 1, VECTORS, DIM)).astype(np.float32)
    return mx.array(x / np.linalg.norm(x, axis=-1, keepdims=True))


def mse(codec, x: mx.array) -> float:
    return mx.square(codec.decode(codec.encode(x)) - x).sum(axis=-1).mean().item()


@pytest.mark.parametrize("bits", TABLE)
def test_two_stages_reach_the_tables_distortion(bits):
    velox, ideal = (
        Rvq(DIM, bits, residual=residual, codebook="gaussian").stages.distortion for residual in ("laplacian", "exact")
    )
    assert velox == pytest.approx(TABLE[bits][0], rel=TABLE_TOLERANCE[bits])
    assert ideal == pytest.approx(TABLE[bits][1], rel=TABLE_TOLERANCE[bits])


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("options", [{}, {"residual": "laplacian"}, {"variant": "refined"}], ids=str)
def test_vectors_have_the_error_of_the_stages(bits, options, vectors):
    """4,000 vectors of 128 coordinates: the mean of 512,000 squared errors is accurate to 1 %, and so is the scale."""
    codec = Rvq(DIM, bits, scale="norm", **options)
    rounding = 2.0**-22  # of a float16 scale's root, twice, squared
    assert mse(codec, vectors) == pytest.approx(codec.stages.distortion, rel=0.02, abs=rounding)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_one_stage_is_better_than_two(bits):
    one = gaussian_codebook(bits).distortion
    refined, plain = (Rvq(DIM, bits, variant=v, codebook="gaussian").stages.distortion for v in ("refined", "plain"))
    assert one <= refined * (1 + 1e-6) < plain
    assert refined <= 1.05 * one


def test_refined_at_two_bits_is_the_one_stage_optimum():
    """The boundary at 0 is the same; halves of two levels each are then Lloyd–Max's own."""
    refined = Rvq(DIM, 2, variant="refined").stages
    assert refined.table.levels == pytest.approx(sphere_codebook(2, DIM).levels, abs=1e-4)


@pytest.mark.parametrize("variant", ["plain", "refined"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_code_is_stage_one_and_then_the_nearest_of_stage_two(bits, variant, vectors):
    """Against the plain definition: nearest first level, then the nearest of the sums that begin with it."""
    codec = Rvq(DIM, bits, variant=variant)
    y = np.random.default_rng(1).standard_normal((1, 1, 50, DIM)).astype(np.float32)
    arrays, _ = codec.quantize(mx.array(y))
    table = codec.stages.table.levels.reshape(2 ** (bits // 2), -1)
    first = np.abs(y[..., None] - codec.stages.first.table.levels).argmin(axis=-1)
    second = np.abs(y[..., None] - table[first]).argmin(axis=-1)
    expected = np.take_along_axis(table[first], second[..., None], axis=-1)[..., 0]
    # a coordinate within float32 rounding of a boundary may have either code
    assert np.isclose(np.array(codec.expand(Code(arrays))), expected, atol=1e-5).mean() > 0.999


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_stage_alone_is_turboquant_of_half_the_bits(bits, vectors):
    codec = Rvq(DIM, bits, scale="mse")
    code = codec.encode(vectors)
    only = Code({name: a for name, a in code.arrays.items() if name != "fine"})
    error = mx.square(codec.decode_coarse(only) - vectors).sum(axis=-1).mean().item()
    assert error == pytest.approx(mse(TurboQuant(DIM, bits // 2, scale="norm"), vectors), rel=0.01)


@pytest.mark.parametrize("bits", [2, 4])
def test_unbiased_inner_products_from_both_stages_and_from_one(bits, vectors):
    codec = Rvq(DIM, bits, scale="unbiased")
    code = codec.encode(vectors)
    for decoded, tolerance in ((codec.decode(code), 1e-3), (codec.decode_coarse(code), 5e-3)):
        # the full scale is exact for each vector, to float16; the coarse one on average, to 1/D and 1 in √(4000·128)
        assert (vectors * decoded).sum(axis=-1).mean().item() == pytest.approx(1, abs=tolerance)


def test_keys_at_one_bit_twice_take_7_5_times_less_than_in_16_bits():
    tokens = 8192
    keys = mx.random.normal((1, 2, tokens, DIM), key=mx.random.key(0)).astype(mx.float16)
    cache = CompressedKVCache(
        METHOD.build(DIM, 2, "keys"), METHOD.build(DIM, 2, "values"), sinks=0, window=0, chunk="codes"
    )
    cache.update_and_fetch(keys, keys)
    mx.eval(cache.state)
    assert keys.nbytes / cache.tensor_nbytes("keys") >= 7.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: METHOD.codec(DIM, 3, "keys"), "takes 2, 4, 6 or 8 bits"),
        (lambda: Rvq(DIM, 2, variant="fine"), "variant='fine' cannot be used"),
        (lambda: Rvq(DIM, 2, residual="normal"), "residual='normal' cannot be used"),
        (lambda: Rvq(DIM, 2, codebook="uniform"), "codebook='uniform' cannot be used"),
        (lambda: Rvq(DIM, 2, scale="max"), "scale='max' cannot be used"),
    ],
)
def test_impossible_settings_are_refused_at_once(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
