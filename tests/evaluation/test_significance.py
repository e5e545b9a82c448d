import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dafm_ray.evaluation import significance
from dafm_ray.evaluation.significance import Resampling, compare, holm


def pair(one, other, groups=None, strata=None):
    one, other = np.array(one, dtype=float), np.array(other, dtype=float)
    resampling = Resampling(groups or [""] * len(one), strata)
    [paired] = compare([("R@10", one, other)], resampling)
    return paired


def test_win_tie_loss_and_difference():
    paired = pair([1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 0, 0, 1])
    assert (paired.win, paired.tie, paired.loss) == (3, 4, 1)
    assert paired.diff == 25.0


@pytest.mark.parametrize(("win", "loss"), [(15, 5), (9, 8), (30, 2)])
def test_the_p_value_of_hits_is_that_of_the_sign_test(win, loss):
    one = [1] * win + [0] * (40 - win)
    other = [0] * win + [1] * loss + [0] * (40 - win - loss)
    exact = binomtest(win, win + loss).pvalue
    assert pair(one, other).p == pytest.approx(exact, abs=0.01)


def test_equal_systems_differ_by_nothing():
    paired = pair([1, 0, 1], [1, 0, 1], ["a", "b", "c"])
    assert (paired.diff, paired.ci95, paired.p, paired.p_holm) == (0.0, (0.0, 0.0), 1.0, 1.0)
    assert not paired.is_significant


def test_a_group_that_wins_together_is_one_win():
    """Forty queries alone are beyond chance, the same forty in four groups are not."""
    one, other = [1] * 40 + [0] * 40, [0] * 80
    assert pair(one, other).p < 0.001
    assert pair(one, other, [f"g{n // 10}" for n in range(80)]).p == pytest.approx(1 / 8, abs=0.01)


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    values = (rng.random(4000) < 0.3).astype(float)
    low, high = Resampling([""] * 4000).interval(values)
    half = 196 * np.sqrt(values.mean() * (1 - values.mean()) / 4000)
    assert low == pytest.approx(100 * values.mean() - half, abs=0.2)
    assert high == pytest.approx(100 * values.mean() + half, abs=0.2)


def test_queries_of_one_group_are_drawn_together():
    values = np.repeat(np.random.default_rng(0).random(100) < 0.5, 20).astype(float)
    alone = Resampling([""] * 2000).interval(values)
    grouped = Resampling([f"g{n // 20}" for n in range(2000)]).interval(values)
    assert grouped[1] - grouped[0] > 3 * (alone[1] - alone[0])


def test_every_column_is_resampled_as_if_it_stood_alone(monkeypatch):
    values_QC = np.random.default_rng(0).random((50, 3))
    values_QC[:20, 1] = np.nan
    together = Resampling([""] * 50, seed=1)
    intervals, p_C = together.intervals(values_QC), together.p_values(values_QC - 0.5)
    monkeypatch.setattr(significance, "CHUNK", 1000)
    for column in range(3):
        alone = Resampling([""] * 50, seed=1)
        assert alone.interval(values_QC[:, column]) == intervals[column]
        assert alone.p_values(values_QC[:, column, None] - 0.5)[0] == p_C[column]


def test_categories_count_alike_in_the_interval():
    """Two hundred queries of one category and eight hundred of another count half each."""
    rng = np.random.default_rng(1)
    small, large = rng.random(200) < 0.9, rng.random(800) < 0.1
    values = np.concatenate([small, large, [np.nan] * 50]).astype(float)
    strata = np.array([0] * 200 + [1] * 800 + [0] * 50)
    low, high = Resampling([""] * 1050, strata).interval(values)
    mean = 50 * (small.mean() + large.mean())
    assert low < mean < high
    spread = 50 * np.sqrt(0.9 * 0.1 / 200 + 0.1 * 0.9 / 800)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_a_column_of_one_category_is_a_mean_over_that_category():
    values = np.array([1.0, 0, 1, 1, np.nan, np.nan, np.nan])
    strata = np.array([0, 0, 0, 0, 1, 1, 1])
    low, high = Resampling([""] * 7, strata).interval(values)
    assert 0 <= low < 75 < high <= 100


def test_a_difference_is_that_of_the_categories_means():
    paired = pair([1, 1, 0, 0, 0], [0, 1, 1, 0, 0], strata=np.array([0, 0, 1, 1, 1]))
    assert paired.diff == pytest.approx(100 * (1 / 2 - 1 / 3) / 2, abs=1e-3)
    assert (paired.win, paired.loss) == (1, 1)
    assert paired.p == 1.0 or paired.p > 0.4


def test_holm_corrects_as_its_author_does():
    corrected = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert corrected.tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_is_never_below_the_p_value(values):
    p = np.array(values)
    corrected = holm(p)
    assert (corrected >= p).all()
    assert (corrected <= 1).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= 0).all()


def test_all_comparisons_of_a_table_are_corrected_together():
    one = np.array([1.0] * 10 + [0.0] * 30)
    other = np.array([0.0] * 10 + [1.0] * 2 + [0.0] * 28)
    [alone] = compare([("R@1", one, other)], Resampling([""] * 40))
    many = compare([("R@1", one, other)] * 4, Resampling([""] * 40))
    assert alone.is_significant
    assert not many[0].is_significant
    assert many[0].p_holm == pytest.approx(4 * alone.p)
