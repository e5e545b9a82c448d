import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.audit import Fingerprints, asked_twice, shift, solved, ties
from dafm_ray.evaluation.metrics import rank_targets


def test_ties_by_hand():
    """One target alone at the top, one tied over the cutoff, one tied far below it."""
    scores_QN = np.array([[9.0, 1, 2, 3, 4], [5, 5, 5, 9, 1], [1, 1, 7, 8, 9]])
    found = ties(rank_targets(scores_QN, np.zeros((3, 1), dtype=np.int64)), 2)
    assert (found.tied, found.undecided) == (2, 1)
    assert (found.worst, found.hits, found.best) == (1, 2, 2)
    assert found.expected == pytest.approx(1 + 1 / 3, abs=0.01)


def test_single_modalities_by_hand():
    composed, image, text = (
        np.array([1, 1, 1, 0, 0]),
        np.array([1, 0, 0, 1, 0]),
        np.array([0, 1, 0, 0, 0]),
    )
    found = solved(composed, image, text)
    assert (found.queries, found.image, found.text, found.either) == (5, 2, 1, 3)
    assert (found.composed, found.composed_rest) == (3, 1)
    alone = solved(composed, None, text)
    assert (alone.image, alone.either, alone.composed_rest) == (None, 1, 2)


def ranked(queries, candidates, signal, seed):
    scores_QN = np.random.default_rng(seed).standard_normal((queries, candidates))
    scores_QN[:, 0] += signal
    return rank_targets(scores_QN, np.zeros((queries, 1), dtype=np.int64))


def test_a_model_that_saw_the_queries_is_suspicious_and_another_gallery_is_not():
    groups = ([""] * 800, [""] * 600)
    seen = shift(ranked(800, 500, 4.0, 0), ranked(600, 1500, 2.5, 1), (500, 1500), groups)
    assert seen.ci95[0] > 0
    assert seen.p < 0.001
    assert seen.diff == pytest.approx(seen.here - seen.there, abs=0.02)
    same = shift(ranked(800, 500, 2.5, 2), ranked(600, 1500, 2.5, 3), (500, 1500), groups)
    assert same.ci95[0] < 0 < same.ci95[1]
    assert same.p > 0.05


@given(st.integers(2, 12), st.integers(1, 5), st.sampled_from(["f2", "f4"]), st.data())
def test_candidates_with_the_same_scores_are_found_and_no_others(candidates, queries, kind, data):
    values = st.lists(st.integers(0, 1), min_size=queries, max_size=queries)
    columns = data.draw(st.lists(values, min_size=candidates, max_size=candidates))
    marks = Fingerprints(candidates)
    marks.add(np.array(columns, dtype=kind).T.copy())
    groups = [group.tolist() for group in marks.groups()]
    alike = {tuple(column): [] for column in columns}
    for n, column in enumerate(columns):
        alike[tuple(column)].append(n)
    assert groups == sorted(own for own in alike.values() if len(own) > 1)


def test_twins_under_one_model_may_differ_under_another():
    marks = Fingerprints(3)
    marks.add(np.array([[1.0, 1.0, 1.0]], np.float32))
    marks.add(np.array([[2.0, 2.0, 3.0]], np.float16))
    assert [group.tolist() for group in marks.groups()] == [[0, 1]]


def test_queries_with_the_same_words_are_one_question():
    queries = [
        Query("a", "r", ("Is Red",)),
        Query("b", "r", ("is  red ",)),
        Query("c", "s", ("is red",)),
        Query("d", "r", ("is red", "and long")),
    ]
    assert asked_twice(queries) == [[0, 1]]
