from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.errors import DataError
from dafm_ray.fusion.bank import own_bank
from dafm_ray.fusion.convex import (
    _labelled,
    _load,
    _log_ranks,
    search_convex,
    search_folds,
    search_strengths,
)
from dafm_ray.fusion.folds import NOBODY, grouped_folds
from tests import samples
from tests.samples import labelled_dataset, score_store


def test_weight_goes_to_the_model_that_knows(tmp_path):
    dataset = labelled_dataset(60, 40)
    store = score_store(tmp_path, dataset, models=("blind", "good"), signal=0.0)
    known = score_store(tmp_path / "k", dataset, models=("good",), signal=3.0, seed=5)
    for key in known.score_keys("good"):
        for path in store.storage.list("records"):
            if key in path:
                store.storage.delete(path)
        store.write(key, known.read(key))
    weights = search_convex(type(store)(store.uri)).weights
    assert weights["good"] > 0.8
    assert sum(weights.values()) == pytest.approx(1)


def test_equal_models_share_and_the_search_repeats(tmp_path):
    store = score_store(tmp_path, labelled_dataset(60, 80), models=("a", "b"), signal=1.5)
    first, second = search_convex(store).weights, search_convex(store).weights
    assert first == second
    assert 0.25 <= first["a"] <= 0.75


def test_queries_without_targets_cannot_tune(tmp_path):
    dataset = labelled_dataset(9, 3)
    unlabelled = tuple(replace(query, targets=()) for query in dataset.queries)
    scored = score_store(tmp_path / "x", dataset)
    store = type(scored).create(
        str(tmp_path / "y"),
        replace(dataset, queries=unlabelled),
        {"name": "x", "split": "y"},
        scored.manifest.models,
        scored.manifest.grid,
        "float32",
    )
    for name in store.models:
        for key in store.score_keys(name):
            store.write(key, np.asarray(scored.read(key)))
    with pytest.raises(DataError, match="no query has a target"):
        search_convex(store)


def test_weights_of_a_fold_are_searched_without_it(tmp_path):
    """The model that knows the queries of fold 0 has no weight for them."""
    dataset = labelled_dataset(60, 90)
    store = score_store(tmp_path / "s", dataset, models=("a", "b"), signal=0.0)
    fold_of = grouped_folds(store.queries, 3)
    for name, folds in (("a", [0]), ("b", [1, 2])):
        for key, rows in zip(store.score_keys(name), _rows_of(store), strict=True):
            scores = np.array(store.read(key))
            for b, q in enumerate(rows):
                if fold_of[q] in folds:
                    scores[b, :] += 2 * _target(store, q, key)
            for path in store.storage.list("records"):
                if key in path:
                    store.storage.delete(path)
            store.write(key, scores)
    store = type(store)(store.uri)
    without_0, _, everything = search_folds([store], [fold_of], [0, 1, NOBODY])
    assert without_0.weights["b"] > 0.8
    assert 0.2 < everything.weights["a"] < everything.weights["b"]


def _rows_of(store):
    return [rows for rows in store.tile_rows for _ in store.tile_columns]


def _target(store, q, key):
    columns = store.tile_columns[int(key.rpartition("-")[2])]
    target = store.positions[store.queries[q].targets[0]]
    return np.array([n == target for n in columns], np.float32)


@given(st.integers(0, 1000), st.integers(1, 3))
def test_kept_leads_give_the_exact_rank_under_any_weights(tmp_path_factory, seed, targets):
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(3))
    store = _several_targets(targets, lambda: tmp_path_factory.mktemp("several"))
    fold_of = np.zeros(store.size("queries"), dtype=np.int64)
    found = _load([store], [fold_of]).log_ranks(weights)
    weights = np.round(weights, 6).astype(np.float32)
    for labelled in _labelled(store):
        fused = np.tensordot(weights, labelled.z_MBN, axes=1)
        fused[labelled.absent_BN] = -np.inf
        expected = _log_ranks(fused, labelled.targets_BT)
        assert found[labelled.rows_B] == pytest.approx(expected, abs=1e-9)


def _several_targets(targets, folder, known={}):  # noqa: B006
    if targets not in known:
        dataset = labelled_dataset(40, 12)
        queries = tuple(
            replace(
                query, targets=tuple(id for id in query.group if id != query.reference)[:targets]
            )
            for query in dataset.queries
        )
        several = replace(dataset, queries=queries)
        known[targets] = score_store(folder(), several, models=("a", "b", "c"))
    return known[targets]


def test_the_strength_of_a_bank_is_searched_where_hubs_hurt(tmp_path, monkeypatch):
    dataset = labelled_dataset(60, 90)
    original = samples.score_matrix

    def hubby(*given):
        scores = original(*given)
        scores[:, :6] += 3.0
        return scores

    monkeypatch.setattr(samples, "score_matrix", hubby)
    store = score_store(tmp_path, dataset, models=("a", "b"), signal=2.0)
    fold_of = grouped_folds(store.queries, 3)
    held_out = [0, 1, 2, NOBODY]
    convex = search_folds([store], [fold_of], held_out)
    bank = own_bank(store, fold_of, 1.0)
    strengths = search_strengths([store], [bank], convex, held_out)
    assert min(strengths) >= 0.5
