"""The computed Lloyd–Max tables are the known ones."""

import math

import numpy as np
import pytest

from veloxlab.codecs.parts.codebooks import coordinate_density, gaussian_codebook, lloyd_max, sphere_codebook
from veloxlab.errors import InputError

# Lloyd–Max for N(0, 1): distortion, index entropy, signal to noise in dB, cosine, positive levels (TurboQuant's
# 0.36 / 0.117 / 0.03 / 0.009)
GAUSSIAN = {
    1: (0.36338, 1.0, 4.396, 0.79788, [0.79788]),
    2: (0.117482, 1.9111, 9.300, 0.93942, [0.45278, 1.51042]),
    3: (0.0345478, 2.8249, 14.616, 0.98257, [0.24509, 0.75601, 1.34391, 2.15195]),
    4: (0.00950101, 3.7653, 20.222, 0.99524, [0.1284, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259]),
    5: (0.00250467, 4.7298, 26.012, 0.99875, None),
    6: (0.00064424, 5.7101, 31.910, 0.99968, None),
    7: (0.00016348, 6.6996, 37.865, 0.99992, None),
}
# the centroids in TurboQuant's released code, found by sampling
RELEASED = {
    1: [0.797885],
    2: [0.4526475, 1.510017],
    3: [0.2449, 0.75567, 1.34335, 2.1509],
}
# distortion with the exact density on the sphere, 1 to 4 bits
SPHERE = {
    32: (0.35336, 0.11160, 0.03226, 0.00877),
    64: (0.35839, 0.11453, 0.03339, 0.00913),
    128: (0.36089, 0.11600, 0.03397, 0.00932),
    256: (0.36214, 0.11674, 0.03426, 0.00941),
}


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_gaussian_table(bits):
    distortion, entropy, decibels, cosine, levels = GAUSSIAN[bits]
    table = gaussian_codebook(bits)
    # last digits of the figures: five or six of the first, then four, three and five after the point
    assert table.distortion == pytest.approx(distortion, rel=2e-5)
    assert -10 * math.log10(table.distortion) == pytest.approx(decibels, abs=6e-4)
    x = np.linspace(-10, 10, 200_001)  # a step of 1e-4: at a boundary the sums change by less than that of a level
    density, decoded = np.exp(-x * x / 2), table.levels[np.searchsorted(table.boundaries, x)]
    share = np.bincount(np.searchsorted(table.boundaries, x), density) / density.sum()
    assert -(share * np.log2(share)).sum() == pytest.approx(entropy, abs=5e-5)
    inner, lengths = (density * x * decoded).sum(), (density * x * x).sum() * (density * decoded * decoded).sum()
    assert inner / math.sqrt(lengths) == pytest.approx(cosine, abs=6e-6)
    if levels:
        assert table.levels[len(levels) :] == pytest.approx(levels, abs=6e-6)


@pytest.mark.parametrize("bits", RELEASED)
def test_the_released_centroids(bits):
    released = RELEASED[bits]
    off = {1: 1e-6, 2: 4.5e-4, 3: 1.1e-3}[bits]  # distance of theirs from the optimum; one bit has a closed form
    assert gaussian_codebook(bits).levels[len(released) :] == pytest.approx(released, abs=off)


@pytest.mark.parametrize("dim", SPHERE)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sphere_table(dim, bits):
    assert sphere_codebook(bits, dim).distortion == pytest.approx(SPHERE[dim][bits - 1], abs=6e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [None, 4, 64, 80, 256])
def test_every_level_is_the_mean_of_its_cell(bits, dim):
    """At the optimum E‖x̂‖² = E⟨x, x̂⟩ = 1 − D; sampled by inverting the density on a fine grid."""
    table = gaussian_codebook(bits) if dim is None else sphere_codebook(bits, dim)
    reach = 10.0 if dim is None else math.sqrt(dim)
    x = np.linspace(-reach, reach, 2_000_001)
    density = np.exp(-x * x / 2) if dim is None else np.clip(1 - x * x / dim, 0, None) ** ((dim - 3) / 2)
    density /= density.sum()
    decoded = table.levels[np.searchsorted(table.boundaries, x)]
    # a boundary is known to a grid step of 1e-5, and crossing one changes the sum by less than that
    assert (density * decoded * (x - decoded)).sum() == pytest.approx(0, abs=1e-5)
    assert (density * (x - decoded) ** 2).sum() == pytest.approx(table.distortion, rel=2e-4)


def test_high_rate_distortion_tends_to_panter_and_dite():
    assert gaussian_codebook(8).distortion * 4**8 == pytest.approx(math.sqrt(3) * math.pi / 2, rel=0.01)


def test_the_sphere_tends_to_the_gaussian():
    assert sphere_codebook(4, 100_000).levels == pytest.approx(gaussian_codebook(4).levels, abs=2e-4)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(InputError, match="cannot be used: give a whole number from 1 to 8"):
        gaussian_codebook(bits)


def test_a_tiny_head_is_refused():
    with pytest.raises(InputError, match="head dimension of 3 is too small"):
        sphere_codebook(2, 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_tabulated_iteration_finds_what_newtons_method_finds(bits):
    """Two ways to one optimum; the tabulated one has 24/65536 standard deviations between its points.

    Measured: levels within 2e-6 and distortion within 4e-7, whichever start wins.
    """
    exact = gaussian_codebook(bits)
    tabulated = lloyd_max(lambda t: coordinate_density(t, None), -12, 12, bits)
    assert tabulated.levels == pytest.approx(exact.levels, abs=1e-5)
    assert tabulated.distortion == pytest.approx(exact.distortion, rel=1e-6)
