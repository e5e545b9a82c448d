from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.chance import RandomOrder, chance_p_values
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.evaluation.significance import Resampling, compare

QUERY = Query("q", "0", ("text",), ("1", "2"), ("0", "3"))


def test_what_is_excluded_is_no_candidate():
    queries = [QUERY, replace(QUERY, excluded=()), replace(QUERY, excluded=("0", "2", "0"))]
    order = RandomOrder.of(queries, [10, 10, 20])
    assert order.candidates.tolist() == [8, 10, 18]
    assert order.targets.tolist() == [2, 2, 1]
    assert order.hits(1) == pytest.approx([2 / 8, 2 / 10, 1 / 18])


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_random_scores_hit_as_often_as_is_expected(seed, k):
    """Over many draws, under the ranking of the metrics themselves."""
    rng = np.random.default_rng(seed)
    ids = [str(n) for n in range(12)]
    drawn = rng.permutation(12).astype(str).tolist()
    cut, end = rng.integers(1, 5), rng.integers(6, 10)
    query = replace(QUERY, targets=tuple(drawn[:cut]), excluded=tuple(drawn[cut:end]))
    positions = {id: n for n, id in enumerate(ids)}
    scores = rng.random((2000, 12))
    scores[:, [positions[id] for id in query.excluded]] = np.nan
    targets = np.tile(columns_of([query.targets], positions), (2000, 1))
    found = (rank_targets(scores, targets).stored <= k).mean()
    [expected] = RandomOrder.of([query], [12]).hits(k)
    assert found == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("hits", [0, 4, 10, 25])
def test_the_p_value_is_that_of_the_binomial_test(hits):
    hits_Q = np.arange(500) < hits
    expected_Q = np.full(500, 0.02)
    [p] = chance_p_values(hits_Q[:, None].astype(float), expected_Q, Resampling([""] * 500))
    counts = np.arange(501)
    exact = binom.pmf(counts, 500, 0.02)[np.abs(counts - 10) >= abs(hits - 10)].sum()
    assert p == pytest.approx(exact, abs=0.01)


def test_no_hit_is_not_below_chance_where_hardly_one_is_due():
    """The signs alone would say so: every query is a little below what is expected of it."""
    expected_Q, none_Q = np.full(300, 0.002), np.zeros(300)
    resampling = Resampling([""] * 300)
    [signs] = compare([("R@1", none_Q, expected_Q)], resampling)
    assert signs.p < 0.001
    least = chance_p_values(none_Q[:, None], expected_Q, resampling)
    [paired] = compare([("R@1", none_Q, expected_Q)], resampling, least)
    assert paired.p > 0.5
    assert not paired.is_significant


def test_categories_count_alike():
    strata = np.repeat([0, 1], [10, 90])
    expected_Q = np.where(strata, 0.1, 0.5)
    drawn = Resampling([""] * 100, strata).random_means(expected_Q)
    assert drawn.mean() == pytest.approx(0.3, abs=0.002)
    assert drawn.var() == pytest.approx((0.25 / 10 + 0.09 / 90) / 4, rel=0.05)


def test_a_random_ranking_holds_chance_in_its_interval():
    """In 95 of a hundred rankings or so."""
    rng = np.random.default_rng(0)
    expected_Q = RandomOrder(rng.integers(40, 60, 800), rng.integers(1, 4, 800)).hits(10)
    resampling = Resampling([f"g{n // 2}" for n in range(800)])
    hits_QC = (rng.random((800, 200)) < expected_Q[:, None]).astype(float)
    bounds = np.array(resampling.intervals(hits_QC - expected_Q[:, None]))
    held = (bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)
    assert 0.91 <= held.mean() <= 0.99
