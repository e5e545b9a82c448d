import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dafm_ray.fusion.normalise import NORMALISATIONS, dbsf, minmax, rank, ranks_of, zscore

rows = arrays(
    np.float32, st.tuples(st.just(2), st.integers(1, 12)), elements=st.floats(-8, 8, width=16)
)


def test_by_hand():
    scores = np.array([1, 2, 3, np.nan], dtype=np.float32)
    deviation = np.sqrt(2 / 3)
    assert zscore(scores)[:3] == pytest.approx([-1 / deviation, 0, 1 / deviation])
    assert minmax(scores)[:3] == pytest.approx([0, 0.5, 1])
    edge = 1 / (6 * deviation)
    assert dbsf(scores)[:3] == pytest.approx([0.5 - edge, 0.5, 0.5 + edge])
    assert rank(scores)[:3] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("count", [1, 7, 1710])
def test_equal_scores_say_nothing(count):
    scores = np.full((2, count), 0.1, dtype=np.float32)
    assert (zscore(scores) == 0).all()
    assert (dbsf(scores) == 0.5).all()
    assert (minmax(scores) == 1).all()


def test_a_lone_hit_does_not_vanish():
    scores = np.array([np.nan, 0.3, np.nan], dtype=np.float32)
    assert minmax(scores)[1] == 1
    assert zscore(scores)[1] == 0


@pytest.mark.parametrize("name", NORMALISATIONS)
@given(scores=rows)
def test_order_is_kept_and_missing_stays_missing(name, scores):
    scores[:, 0] = np.nan
    normalised = NORMALISATIONS[name](scores)
    assert normalised.shape == scores.shape
    assert normalised.dtype == scores.dtype
    assert np.isnan(normalised[:, 0]).all()
    assert np.isfinite(normalised[:, 1:]).all()
    for before, after in zip(scores[:, 1:], normalised[:, 1:], strict=True):
        order = np.argsort(-before, kind="stable")
        assert (np.diff(after[order]) <= 1e-6).all()


@given(rows)
def test_ranks_break_ties_by_stored_order(scores):
    for row, ranks in zip(scores, ranks_of(scores), strict=True):
        expected = sorted(range(len(row)), key=lambda n: (-row[n], n))
        assert [int(ranks[n]) for n in expected] == list(range(1, len(row) + 1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ranks_of_zeros_infinities_and_missing_scores(dtype):
    scores = np.array([-np.inf, -0.0, np.nan, 0.0, -np.nan, np.inf, -1], dtype=dtype)
    np.testing.assert_equal(ranks_of(scores), [5, 2, np.nan, 3, np.nan, 1, 4])
