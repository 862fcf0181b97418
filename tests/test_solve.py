"""Solvers over tables of costs and losses: as good as an exhaustive search, and fast for many components."""

import itertools
import time

import numpy as np
import pytest

from veloxlab.allocate.solve import Problem
from veloxlab.codecs.parts.water_filling import greedy_bits
from veloxlab.errors import InputError

WIDTHS = np.arange(2, 7)


def exponential(weights, betas, byte_of_a_bit=8.0, scale=2.0):
    """Return losses w·β^−b at bytes of b bits and a scale."""
    costs = np.tile(byte_of_a_bit * WIDTHS + scale, (len(weights), 1))
    return Problem(costs, np.asarray(weights)[:, None] * np.asarray(betas, float)[:, None] ** -WIDTHS)


def everything(problem):
    """Return costs and losses of all choices of all components."""
    count, columns = problem.costs.shape
    every = np.array(list(itertools.product(range(columns), repeat=count)))
    at = np.arange(count)
    return problem.costs[at, every].sum(axis=1), problem.losses[at, every].sum(axis=1)


@pytest.mark.parametrize("seed", range(200))
def test_convex_curves_are_allocated_as_well_as_by_exhaustive_search(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 6))
    weights, betas = rng.lognormal(0, 1.5, count), rng.uniform(2.5, 5.5, count)
    problem = exponential(weights, betas)
    costs, losses = everything(problem)
    bits = int(rng.integers(2 * count, 6 * count + 1))
    budget = 8 * bits + 2 * count
    best = losses[costs <= budget].min()
    solution = problem.within(budget)
    assert solution.cost <= budget
    assert solution.loss == pytest.approx(best, rel=1e-12)
    assert solution.bound == pytest.approx(best, rel=1e-12)
    # and RateQuant's greedy rule is the same
    greedy = greedy_bits(weights.tolist(), bits, rates=betas.tolist(), least=2, most=6)
    assert (weights * betas ** -np.array(greedy)).sum() == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_any_table_stays_between_its_bound_and_one_step_above_the_best(seed):
    """Costs of any size, curves that are not convex, and missing choices."""
    rng = np.random.default_rng(seed)
    count, columns = int(rng.integers(1, 5)), int(rng.integers(2, 7))
    costs, losses = rng.integers(1, 40, (count, columns)).astype(float), rng.lognormal(0, 2, (count, columns))
    missing = rng.random((count, columns)) < 0.2
    missing[:, 0] = False
    costs[missing] = losses[missing] = np.inf
    problem = Problem(costs, losses)
    every_cost, every_loss = everything(problem)
    budget = rng.uniform(problem.frontier.costs[0], costs[~missing].reshape(-1).max() * count)
    best = every_loss[every_cost <= budget].min()
    solution = problem.within(budget)
    assert solution.cost <= budget * (1 + 1e-9)
    assert solution.bound - 1e-9 <= best <= solution.loss + 1e-9
    assert solution.loss == pytest.approx(losses[np.arange(count), solution.choice].sum(), rel=1e-12)
    reached = problem.reaching(solution.loss, losses)
    assert reached.loss <= solution.loss * (1 + 1e-9)
    assert every_cost[every_loss <= solution.loss * (1 + 1e-12)].min() <= reached.cost + 1e-9


def test_a_place_where_a_step_ends_is_optimal():
    problem = exponential([1.0, 9.0, 2.0], [3.5, 3.5, 5.0])
    costs, losses = everything(problem)
    ends, best = problem.frontier.costs, problem.frontier.losses
    assert len(ends) == 1 + 3 * 4
    for end, lowest in zip(ends, best, strict=True):
        assert lowest == pytest.approx(losses[costs <= end + 1e-9].min(), rel=1e-12)


def test_the_rest_of_a_budget_goes_to_steps_that_fit():
    """The steepest step costs 10 and does not fit into 9, but another does."""
    problem = Problem(np.array([[0.0, 10.0], [0.0, 4.0]]), np.array([[100.0, 0.0], [1.0, 0.0]]))
    solution = problem.within(9)
    assert solution.choice.tolist() == [0, 1]
    assert (solution.cost, solution.loss) == (4, 100)
    assert solution.bound == pytest.approx(101 - 9 * 10)


def test_whole_widths_lose_little_against_continuous_ones():
    weights = np.random.default_rng(0).lognormal(0, 0.76, 400)
    problem = exponential(weights, [3.5] * 400)
    whole = problem.within(400 * (8 * 4 + 2)).loss
    ideal = 400 * 3.5**-4 * np.exp(np.log(weights).mean())  # RateQuant, Thm 3: every component loses the same
    assert ideal < whole < 1.1 * ideal


def test_ten_thousand_components_are_solved_by_a_bisection():
    """A budget needs no pass over the table except for its rest, and much less time than the greedy rule on a heap."""
    rng = np.random.default_rng(0)
    weights, betas = rng.lognormal(0, 1.5, 10_000), rng.uniform(3, 5, 10_000)
    problem = exponential(weights, betas)
    budgets = [8 * bits * 10_000 + 2 * 10_000 + 3 for bits in (2.5, 3.0, 3.3, 4.1)]
    problem.within(budgets[0])

    def seconds(job):
        start = time.thread_time()  # of this thread only, because other processes use the processor too
        job()
        return time.thread_time() - start

    solved = min(seconds(lambda: [problem.within(b) for b in budgets]) for _ in range(3)) / len(budgets)
    heap = min(
        seconds(lambda: greedy_bits(weights.tolist(), 30_000, rates=betas.tolist(), least=2, most=6)) for _ in range(3)
    )
    assert heap / solved > 3


def test_problems_without_a_solution_are_refused():
    problem = exponential([1.0], [2.0])
    with pytest.raises(InputError, match=r"A loss of 0.01 cannot be reached: .* lose 0.015625"):
        problem.reaching(0.01, problem.losses)
    with pytest.raises(InputError, match="Component 0 has no choice left"):
        Problem(np.full((1, 2), np.inf), np.zeros((1, 2)))
