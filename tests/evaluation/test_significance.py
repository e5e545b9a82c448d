import numpy as np
import pytest

from dafm_ray.evaluation.significance import Bootstrap, compare


def test_win_tie_loss_and_difference():
    bootstrap = Bootstrap([""] * 8)
    one, other = np.array([1, 1, 1, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 0, 1, 0, 0, 1])
    paired = compare(one, other, "R@10", bootstrap)
    assert (paired.win, paired.tie, paired.loss) == (3, 4, 1)
    assert paired.diff == 25.0


def test_the_p_value_is_the_exact_sign_test():
    bootstrap = Bootstrap([""] * 40)
    one = np.array([1] * 15 + [0] * 25)
    other = np.array([0] * 15 + [1] * 5 + [0] * 20)
    exact = 0.0413895  # two-sided binomial test of 15 against 5
    assert compare(one, other, "R@1", bootstrap).p == pytest.approx(exact, abs=0.003)


def test_equal_systems_differ_by_nothing():
    hits = np.array([1, 0, 1])
    paired = compare(hits, hits, "R@1", Bootstrap(["a", "b", "c"]))
    assert (paired.diff, paired.ci95, paired.p) == (0.0, (0.0, 0.0), 1.0)


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    values = (rng.random(4000) < 0.3).astype(float)
    low, high = Bootstrap([""] * 4000).interval(values)
    half = 196 * np.sqrt(values.mean() * (1 - values.mean()) / 4000)
    assert low == pytest.approx(100 * values.mean() - half, abs=0.2)
    assert high == pytest.approx(100 * values.mean() + half, abs=0.2)


def test_queries_of_one_group_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).random(100) < 0.5, 20).astype(float)
    alone = Bootstrap([""] * 2000).interval(values)
    grouped = Bootstrap([f"g{n // 20}" for n in range(2000)]).interval(values)
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert Bootstrap([""] * 50, 1).interval(values) == Bootstrap([""] * 50, 1).interval(values)


def test_categories_count_alike_in_the_interval():
    """Two hundred queries of one category and eight hundred of another count half each."""
    rng = np.random.default_rng(1)
    small, large = rng.random(200) < 0.9, rng.random(800) < 0.1
    values = np.concatenate([small, large, [np.nan] * 50]).astype(float)
    strata = np.array([0] * 200 + [1] * 800 + [0] * 50)
    low, high = Bootstrap([""] * 1050).interval(values, strata)
    mean = 50 * (small.mean() + large.mean())
    assert low < mean < high
    spread = 50 * np.sqrt(0.9 * 0.1 / 200 + 0.1 * 0.9 / 800)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_a_difference_is_that_of_the_categories_means():
    one, other = np.array([1, 1, 0, 0, 0]), np.array([0, 1, 1, 0, 0])
    paired = compare(one, other, "R@10", Bootstrap([""] * 5), np.array([0, 0, 1, 1, 1]))
    assert paired.diff == pytest.approx(100 * (1 / 2 - 1 / 3) / 2, abs=1e-3)
    assert (paired.win, paired.loss) == (1, 1)
