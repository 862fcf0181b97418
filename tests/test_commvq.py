"""CommVQ's own claims: tables commute with RoPE, its bits, exact inverse RoPE, and training that learns.

The paper's squared errors need Llama's keys, and are not reproduced here; the notebook shows SmolLM2's.
"""

from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
import pytest

from veloxlab.codecs.base import Sample
from veloxlab.codecs.commvq import METHOD, CommVQ
from veloxlab.codecs.commvq_training import train_tables
from veloxlab.codecs.parts.rope import Rope
from veloxlab.errors import InputError

DIM, HEADS = 64, 2
FREQS = 10_000.0 ** (mx.arange(16) / 16) * mx.linspace(1, 8, 16)  # a scaled RoPE, over half of the coordinates
ROPES = {
    "half-split": Rope(DIM),
    "traditional": Rope(DIM, traditional=True),
    "scaled": Rope(32, base=None, freqs=FREQS),
    "scaled-traditional": Rope(32, traditional=True, base=None, freqs=FREQS),
    "interpolated": Rope(DIM, base=500_000.0, scale=0.25),
}
FLOAT32 = 2.0**-23


def keys_before_rope(tokens: int, seed: int, heads: int = HEADS) -> np.ndarray:
    """Return vectors ``[1, heads, tokens, D]`` with a mean and a few large directions per head, as keys have."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    mean = 2 * fixed.standard_normal((1, heads, 1, DIM))
    directions = fixed.standard_normal((1, heads, 6, DIM))
    x = mean + rng.standard_normal((1, heads, tokens, 6)) @ directions
    return (x + 0.5 * rng.standard_normal(x.shape)).astype(np.float32)


@cache
def fitted(name: str = "half-split", bits: int = 1, role: str = "keys", stages: int = 0) -> CommVQ:
    rope = ROPES[name]
    x = rope.forward(mx.array(keys_before_rope(600, seed=1)), 0)
    return METHOD.codec(DIM, bits, role, stages=stages).fit(Sample(x, None, rope))


def relative_error(codec: CommVQ, x: mx.array, start: int = 0) -> float:
    return (mx.square(codec.decode(codec.encode(x, start)) - x).sum() / mx.square(x).sum()).item()


def exact_rotations(rope: Rope, position: int) -> np.ndarray:
    """Return RoPE's own 2 × 2 blocks at a position, as one matrix ``[D, D]`` in float64, without our `Rope`."""
    count = rope.dims // 2
    period = rope.base ** (np.arange(count) / count) if rope.freqs is None else np.array(rope.freqs, np.float64)
    first = np.arange(0, 2 * count, 2) if rope.traditional else np.arange(count)
    second = first + 1 if rope.traditional else first + count
    angle, matrix = position * rope.scale / period, np.eye(DIM)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def read_indices(codec: CommVQ, codes: mx.array) -> np.ndarray:
    """Return indices ``[..., 2·R]`` of 6 bits, least significant bit first, without our unpack."""
    bits = np.unpackbits(np.array(codes), axis=-1, bitorder="little")[..., : 12 * codec.stages]
    return bits.reshape(*bits.shape[:-1], 2 * codec.stages, 6) @ (1 << np.arange(6))


@pytest.mark.parametrize("name", ROPES)
def test_every_m_commutes_with_rope_to_machine_precision(name):
    """The paper's identity in float64, for the matrices M(x, y) of our tables and positions up to 1.3e5."""
    codec = fitted(name)
    both = np.array(codec.both_tables(HEADS))[:, :2].astype(np.float64)  # of two stages: [H, 2, 2, 64, D]
    first, second = codec.pairs.T
    # what index a adds is the first row of M, what index b adds is the second; columns are a pair's coordinates
    m = np.stack([both[..., first], both[..., second]], axis=-1).transpose(0, 1, 3, 4, 2, 5)  # [H, 2, 64, D/2, 2, 2]
    assert np.array_equal(m[..., 0, 0], m[..., 1, 1])
    assert np.array_equal(m[..., 0, 1], -m[..., 1, 0])
    for position in (1, 4096, 130_000):
        whole = exact_rotations(codec.rope, position)
        turn = np.stack([[whole[first, first], whole[first, second]], [whole[second, first], whole[second, second]]])
        turn = turn.transpose(2, 0, 1)  # [D/2, 2, 2]
        # each entry is a difference of two sums of two products, every one rounded: at most six half steps of 2·max|M|
        bound = 6 * np.abs(m).max() * np.finfo(float).eps
        assert np.abs(m @ turn - turn @ m).max() <= bound
        # the layer's own rotation, in float32, is the same: the error of its angle is a step of the position
        rotated = np.array(codec.rope.forward(mx.eye(DIM)[None, None].swapaxes(1, 2), position))[0, :, 0].T
        assert np.abs(rotated - whole).max() <= 4 * FLOAT32 * max(1, position)


@pytest.mark.parametrize("name", ROPES)
def test_table_reuse_is_exact_in_double_precision(name):
    """The paper's attention: rotate the tables to a position once, and look all codes up there."""
    codec, position, tokens = fitted(name), 77_777, 20
    code = codec.encode(codec.rope.forward(mx.array(keys_before_rope(tokens, seed=2)), 0), 0)
    indices = read_indices(codec, code.arrays["codes"])[0]  # [H, S, 2R]
    tables = np.array(codec.both_tables(HEADS)).astype(np.float64).reshape(HEADS, 2 * codec.stages, 64, DIM)
    turn, q = exact_rotations(codec.rope, position), np.random.default_rng(0).standard_normal(DIM)
    for head in range(HEADS):
        entries = tables[head, np.arange(2 * codec.stages), indices[head]]  # [S, 2R, D]
        decoded_then_rotated = entries.sum(axis=1) @ turn.T @ q
        by_tables = tables[head] @ turn.T @ q  # [2R, 64]
        looked_up = by_tables[np.arange(2 * codec.stages), indices[head]].sum(axis=1)
        size = np.linalg.norm(q) * np.linalg.norm(entries, axis=-1).sum(axis=1).max()
        assert np.abs(decoded_then_rotated - looked_up).max() <= 1e-14 * size


@pytest.mark.parametrize("name", ROPES)
def test_scores_from_rotated_tables_are_scores_of_rotated_sums(name):
    """The same in our float32, with each token at its own position."""
    codec = fitted(name)
    start, tokens = 3000, 5
    rope = codec.rope
    code = codec.encode(rope.forward(mx.array(keys_before_rope(tokens, seed=2)), start), start)
    q = mx.random.normal((1, HEADS, 1, DIM), key=mx.random.key(0))
    indices = read_indices(codec, code.arrays["codes"])
    tables = codec.both_tables(HEADS).reshape(1, HEADS, 2 * codec.stages * 64, 1, DIM)
    by_tables = np.zeros((HEADS, tokens))
    for t in range(tokens):
        rotated = rope.forward(tables.reshape(1, -1, 1, DIM), start + t).reshape(HEADS, 2 * codec.stages, 64, DIM)
        look_up = np.array(rotated @ q[0, :, :, :, None].squeeze(1)[:, None]).squeeze(-1)  # [H, 2R, 64]
        for head in range(HEADS):
            by_tables[head, t] = sum(look_up[head, i, indices[0, head, t, i]] for i in range(2 * codec.stages))
    by_tables *= np.array(codec.scales(code))[0, :, :, 0]
    ours = np.array(codec.scores(q, code))[0, :, 0]
    size = np.linalg.norm(np.array(q)) * np.linalg.norm(np.array(codec.decode(code)), axis=-1).max()
    # sums of 64 products, added in another order
    assert np.abs(ours - by_tables).max() < 16 * FLOAT32 * size


@pytest.mark.parametrize(("bits", "stages", "code_bits"), [(1, 11, 1.03125), (2, 21, 1.96875), (4, 43, 4.03125)])
def test_bits_are_the_papers_at_head_dimension_128(bits, stages, code_bits):
    codec = METHOD.codec(128, bits, "keys")
    assert codec.stages == stages  # type: ignore[attr-defined]
    assert 12 * codec.stages / 128 == code_bits  # type: ignore[attr-defined]
    padding = -12 * stages % 8 / 128
    assert codec.bits_per_value == code_bits + padding + 16 / 128


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_undone_exactly(name):
    rope = ROPES[name]
    x = mx.array(keys_before_rope(8, seed=3))
    for start in (0, 100, 4096 - 8):
        back = rope.inverse(rope.forward(x, start), start)
        # forward and back by the same angle; two rotations of numbers up to max|x| are four products and two sums each
        assert mx.abs(back - x).max().item() <= 8 * FLOAT32 * mx.abs(x).max().item()


@pytest.mark.parametrize("name", ROPES)
def test_keys_are_coded_as_they_are_before_rope(name):
    """A vector's code is the same at any position, and so is its error."""
    codec, x = fitted(name), mx.array(keys_before_rope(200, seed=4))
    first, later = (codec.encode(codec.rope.forward(x, start), start) for start in (0, 3896))
    same = np.array(first.arrays["codes"]) == np.array(later.arrays["codes"])
    assert same.all(axis=-1).mean() > 0.98  # rounding decides ties, and a tie changes all later stages
    there = codec.rope.forward(x, 3896)
    at_zero = relative_error(codec, codec.rope.forward(x, 0))
    # the same keys with other rounding, 6e-6 apart, except for a tie
    assert relative_error(codec, there, 3896) == pytest.approx(at_zero, rel=0.01)
    # a wrong position gives keys unrelated to the stored ones: an error of 0.8 to 1.7, not 0.035
    assert (mx.square(codec.decode(first) - there).mean() / mx.square(there).mean()).item() > 0.5


@pytest.mark.parametrize("role", ["keys", "values"])
def test_a_slice_is_coded_as_in_the_whole(role):
    codec = fitted(role=role)
    x = codec.decode(codec.encode(mx.array(keys_before_rope(50, seed=5))))
    whole, part = codec.encode(x), codec.encode(x[:, :, 13:], 13)
    same = (np.array(whole.arrays["codes"])[:, :, 13:] == np.array(part.arrays["codes"])).all(axis=-1)
    assert same.mean() > 0.98  # one of the 74 vectors can round to another code
    ours, again = np.array(codec.decode(whole[13:])), np.array(codec.decode(part))
    # the same sums of the same entries; a scale may round to the float16 beside it, 2^-10 of it
    assert np.allclose(ours[same], again[same], rtol=2**-9, atol=8 * FLOAT32 * np.abs(ours).max())
    assert part.start == whole[13:].start == 13


def test_more_vectors_than_a_chunk_are_coded_like_few():
    codec = fitted(role="values", stages=1)
    x = mx.array(keys_before_rope(5000, seed=6))  # 10,000 vectors: two chunks
    whole, part = codec.encode(x), codec.encode(x[:, :, 4500:])
    same = np.array(whole.arrays["codes"])[:, :, 4500:] == np.array(part.arrays["codes"])
    assert same.all(axis=-1).mean() > 0.98


@pytest.mark.parametrize("role", ["keys", "values"])
def test_more_stages_lose_less_on_new_vectors(role):
    x = ROPES["half-split"].forward(mx.array(keys_before_rope(400, seed=7)), 0)
    errors = [relative_error(fitted(role=role, stages=stages), x) for stages in (1, 3, 11)]
    # 24 bits more on 64 coordinates divide the error by 4^(24/64) = 1.7 if all directions are equal, and by more
    # if six dominate, as before RoPE; 96 bits by 8 at best. Measured: 3.3 and 4.2 for keys, 1.7 and 5.2 for values
    assert errors[0] > 1.5 * errors[1]
    assert errors[1] > 3.5 * errors[2]


def test_trained_tables_beat_vectors_taken_from_the_sample():
    """Also on new vectors, and by far: random tables spend each stage on the part that all vectors have in common."""
    rope, x = ROPES["half-split"], mx.array(keys_before_rope(400, seed=8))
    codec = fitted()
    rng = np.random.default_rng(0)
    random = rng.standard_normal((HEADS, codec.stages, 64, DIM)).astype(np.float16)
    sizes = np.std(np.array(codec.tables), axis=(2, 3), keepdims=True)
    untrained = CommVQ(DIM, 1, "keys", tables=mx.array((random * sizes).astype(np.float16)), rope=rope)
    there = rope.forward(x, 0)
    assert relative_error(codec, there) < 0.1 * relative_error(untrained, there)  # measured: 0.035 against 0.56


def test_training_lowers_the_error_as_em_must():
    """A known table is found again: vectors that are C[a] + i·C[b] exactly, with 8 entries."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8, 8)) + 1j * rng.standard_normal((8, 8))
    z = table[rng.integers(8, size=1000)] + 1j * table[rng.integers(8, size=1000)]
    x = np.concatenate([z.real, z.imag], axis=1).astype(np.float32)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    tables = mx.array(train_tables(x, 3, np.arange(16), seed=0))[None]
    codec = CommVQ(16, 2, "values", stages=3, scale="norm", tables=tables.astype(mx.float16))
    # 64 centres on 16 dimensions, each at its own length: three stages of 64 leave 0.006, one 0.08
    assert relative_error(codec, mx.array(x)[None, None]) < 0.01


def test_the_unbiased_scale_keeps_the_inner_product_of_a_key_with_itself():
    codec, x = replace(fitted(), scale="unbiased"), mx.array(keys_before_rope(200, seed=9))
    x = codec.rope.forward(x, 0)
    decoded = codec.decode(codec.encode(x))
    ratio = (decoded * x).sum(axis=-1) / mx.square(x).sum(axis=-1)
    # a scale is held as the float16 of its root: 2·2⁻¹¹ at most
    assert mx.abs(ratio - 1).max().item() < 1.1 * 2**-10


@pytest.mark.parametrize("scale", ["unbiased", "mse", "norm"])
def test_a_vector_that_the_tables_cannot_reach_stays_finite_and_no_larger_than_four_times(scale):
    """Entries that training never used are zero, and others can point away from later vectors."""
    tables = mx.concatenate([mx.zeros((1, 1, 63, DIM)), mx.ones((1, 1, 1, DIM))], axis=2).astype(mx.float16)
    codec = CommVQ(DIM, 1, "values", stages=1, scale=scale, tables=tables)
    x = mx.random.normal((1, 1, 200, DIM), key=mx.random.key(0))
    lengths = mx.linalg.norm(codec.decode(codec.encode(x)), axis=-1) / mx.linalg.norm(x, axis=-1)
    # the available entries have RMS 0, 1 or √2
    assert lengths.max().item() < 4.01 * 2**0.5
    assert mx.isfinite(lengths).all()


def test_impossible_settings_are_refused():
    x = mx.array(keys_before_rope(100, seed=10))
    with pytest.raises(InputError, match="rotary"):
        METHOD.codec(DIM, 1, "keys").fit(Sample(x))
    with pytest.raises(InputError, match="stages=-1"):
        METHOD.codec(DIM, 1, "keys", stages=-1)
    with pytest.raises(InputError, match="scale='max' cannot be used"):
        METHOD.codec(DIM, 1, "keys", scale="max")
    with pytest.raises(InputError, match="head dimension of 65"):
        METHOD.codec(65, 1, "keys")
    with pytest.raises(InputError, match="63 tokens"):
        METHOD.codec(DIM, 1, "values").fit(Sample(x[:, :, :63]))
    with pytest.raises(InputError, match="fitted to 2 KV heads and was given 1"):
        fitted().encode(x[:, :1])


def test_angles_for_kernels_are_made_once_however_many_layers_there_are():
    x = mx.zeros((1, HEADS, 1, DIM))
    codecs = [replace(fitted(), rope=Rope(DIM, base=10_000.0 + i)) for i in range(300)]
    codes = [[codec.encode(x, start) for start in (4, 36)] for codec in codecs]
    seen = [[codec.reader(code).angles for code in own] for codec, own in zip(codecs, codes, strict=True)]
    for codec, own, kept in zip(codecs, codes, seen, strict=True):
        assert [codec.reader(code).angles is angles for code, angles in zip(own, kept, strict=True)] == [True, True]
        assert [angles[0].item() for angles in kept] == [4, 36]
