from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.errors import ConfigError
from dafm_ray.fusion.folds import grouped_folds
from tests.samples import labelled_dataset

QUERIES = labelled_dataset(40, 60).queries


def grouped(labels):
    return [replace(QUERIES[n], fold_group=label) for n, label in enumerate(labels)]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=60), st.integers(2, 4))
def test_a_group_is_never_split_and_folds_are_even(labels, folds):
    if len(set(labels)) < folds:
        return
    fold_of = grouped_folds(grouped(labels), folds)
    for label in set(labels):
        assert len({int(fold_of[n]) for n, given in enumerate(labels) if given == label}) == 1
    sizes = np.bincount(fold_of, minlength=folds)
    assert sizes.min() > 0
    assert sizes.max() - sizes.min() <= max(labels.count(label) for label in labels)


@given(st.permutations(range(60)), st.integers(0, 3))
def test_the_order_of_the_queries_does_not_matter(places, seed):
    fold_of = grouped_folds(QUERIES, 5, seed)
    shuffled = grouped_folds([QUERIES[n] for n in places], 5, seed)
    assert (shuffled == fold_of[list(places)]).all()


def test_another_seed_gives_other_folds_and_queries_without_group_stand_alone():
    alone = grouped([""] * 60)
    assert (grouped_folds(alone, 5, 0) != grouped_folds(alone, 5, 1)).any()
    assert np.bincount(grouped_folds(alone, 5)).tolist() == [12] * 5


def test_too_few_groups_are_refused():
    with pytest.raises(ConfigError, match="1 groups of queries do not make 2 folds"):
        grouped_folds(grouped(["a", "a"]), 2)
