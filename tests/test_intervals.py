"""Intervals are those of Student's t."""

import numpy as np
import pytest

from veloxlab.errors import InputError
from veloxlab.measure.experiments import mean_interval, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975])
def test_quantiles_are_those_of_scipy(freedom, probability):
    from scipy import stats  # here, because the import takes a second

    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), abs=1e-5)


def test_nineteen_of_twenty_intervals_hold_the_mean():
    rng = np.random.default_rng(0)
    ends = [mean_interval(rng.normal(3, 2, 5)) for _ in range(2000)]
    held = np.mean([low < 3 < high for _, low, high in ends])
    assert held == pytest.approx(0.95, abs=0.015)  # three standard deviations of 2,000 trials


def test_too_few_values_are_refused():
    with pytest.raises(InputError, match="takes two values or more, and there are 1"):
        mean_interval([1.0])
    with pytest.raises(InputError, match="no quantile at a probability of 1 with 3"):
        student_quantile(1, 3)
