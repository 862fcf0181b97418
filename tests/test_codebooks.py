"""The computed Lloyd–Max tables are the known ones."""

import math

import numpy as np
import pytest

from veloxlab.codecs.codebooks import coordinate_density, gaussian_codebook, lloyd_max, sphere_codebook
from veloxlab.errors import InputError

# Lloyd–Max for N(0, 1): distortion, index entropy, positive levels (TurboQuant's 0.36 / 0.117 / 0.03 / 0.009)
GAUSSIAN = {
    1: (0.36338, 1.0, [0.79788]),
    2: (0.117482, 1.9111, [0.45278, 1.51042]),
    3: (0.0345478, 2.8249, [0.24509, 0.75601, 1.34391, 2.15195]),
    4: (0.00950101, 3.7653, [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259]),
    5: (0.00250467, 4.7298, None),
    6: (0.00064424, 5.7101, None),
    7: (0.00016348, 6.6996, None),
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
    distortion, entropy, levels = GAUSSIAN[bits]
    table = gaussian_codebook(bits)
    assert table.distortion == pytest.approx(distortion, rel=2e-5)  # the figures have five or six digits
    assert table.entropy_bits == pytest.approx(entropy, abs=5e-5)
    if levels:
        assert table.levels[len(levels) :] == pytest.approx(levels, abs=6e-6)


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
    with pytest.raises(InputError, match=r"out of range: choose a whole number of bits from 1 to 8"):
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
    assert tabulated.entropy_bits == pytest.approx(exact.entropy_bits, abs=1e-5)
