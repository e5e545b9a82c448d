from dataclasses import replace

import numpy as np
import pytest

from dafm_ray.errors import DataError
from dafm_ray.fusion.convex import search_convex
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
