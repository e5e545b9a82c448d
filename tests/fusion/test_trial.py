import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dafm_ray.config import StudyConfig
from dafm_ray.fusion.artefact import load_artefact
from dafm_ray.fusion.study import GROW
from dafm_ray.fusion.train import folds_of, open_stores
from dafm_ray.fusion.trial import (
    FUSION,
    TRIALS,
    deciding,
    recorded,
    reporting,
    run_trial,
    static_system,
    summary_of,
    values_of,
)
from dafm_ray.storage import open_storage
from dafm_ray.tiles import blocks
from dafm_ray.tiles.manifest import Grid
from dafm_ray.tiles.store import TileStore
from tests.samples import labelled_dataset, score_store

MODELS = ("a", "b", "c")
FUSED = {"recipe": {"epochs": 2, "batch": 32}, "network": {"width": 4}}


def study_of(root, store, **change):
    given = {
        "kind": "networks",
        "fusion": {"store": store.uri, **FUSED},
        "out": str(root / "study"),
        "spaces": ({"recipe.learning_rate": (0.01, 0.001)},),
        "report_folds": 2,
    }
    return StudyConfig(**{**given, **change})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    dataset = labelled_dataset(60, 90)
    return score_store(tmp_path_factory.mktemp("s") / "store", dataset, MODELS, Grid(64, 45, 60))


def test_labels_that_are_reported_on_leave_no_trace_in_a_trial(tmp_path, store):
    """Other labels of these queries, the same scores: the same networks, to the bit."""
    kept = folds_of(study_of(tmp_path, store).base, [store])[0] >= 3
    place = {query.id: q for q, query in enumerate(store.queries)}
    dataset = labelled_dataset(60, 90)
    moved = tuple(
        replace(query, targets=(query.group[2],)) if kept[place[query.id]] else query
        for query in dataset.queries
    )
    other = tmp_path / "other"
    shutil.copytree(store.uri, other)
    data = blocks.encode_queries(sorted(moved, key=lambda query: place[query.id]))
    tables = {**store.manifest.tables, "queries.arrow": blocks.checksum(data)}
    (other / "queries.arrow").write_bytes(data)
    (other / "manifest.json").write_bytes(replace(store.manifest, tables=tables).to_bytes())
    found = []
    for root, uri in ((tmp_path / "1", store.uri), (tmp_path / "2", str(other))):
        study = study_of(root, TileStore(uri))
        trial = run_trial(study, {}, open_storage(study.out))
        assert not trial.failure
        networks = load_artefact(root / "study" / TRIALS / trial.name / FUSION).networks
        found.append((trial.metrics, [network.state_dict() for network in networks]))
    assert TileStore(str(other)).queries != store.queries
    (metrics, ours), (other_metrics, theirs) = found
    assert metrics == other_metrics
    for one, two in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_trial_is_measured_on_the_queries_that_decide(tmp_path, store):
    study = study_of(tmp_path, store)
    config = study.base
    [first], [last] = deciding(study, config), reporting(study, config)
    folds = folds_of(config, [store])[0]
    assert first.hidden == frozenset(np.flatnonzero(folds >= 3).tolist())
    assert last.hidden == frozenset(np.flatnonzero(folds < 3).tolist())
    storage = open_storage(study.out)
    trial = run_trial(study, {}, storage)
    assert not trial.failure
    assert trial.seconds > 0
    assert recorded(storage) == {trial.name: trial}
    folder = tmp_path / "study" / TRIALS / trial.name / FUSION
    learned = load_artefact(folder).on(first).learned
    assert summary_of([learned], [first]).percent("R@10") == pytest.approx(trial.score, abs=1e-4)
    assert trial.metrics["R@10"] == pytest.approx(trial.score, abs=1e-4)


@pytest.mark.parametrize("setting", [{"seed": 1}, {"folds": 6}, {"models": ["a", "c"]}])
def test_every_trial_is_kept_from_the_same_labels(tmp_path, store, setting):
    study = study_of(tmp_path, store)
    [base] = deciding(study, study.base)
    [other] = deciding(study, study.with_setting(setting))
    assert other.hidden == base.hidden
    assert reporting(study, study.with_setting(setting))[0].hidden.isdisjoint(base.hidden)


def test_a_trial_repeats_to_the_bit(tmp_path, store):
    weights = []
    for n in range(2):
        study = study_of(tmp_path / str(n), store)
        trial = run_trial(study, {"recipe.scaling": 50.0}, open_storage(study.out))
        folder = tmp_path / str(n) / "study" / TRIALS / trial.name / FUSION
        weights.append(load_artefact(folder).networks[0].state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_setting_that_cannot_be_trained_is_recorded_with_its_reason(tmp_path, store):
    study = study_of(tmp_path, store)
    setting = {"recipe.temperature": "paper", "recipe.scaling": 0.5}
    said = []
    trial = run_trial(study, setting, open_storage(study.out), said.append)
    assert "is not below the scaling factor" in trial.failure
    assert recorded(open_storage(study.out)) == {trial.name: trial}
    assert said == [0.0]


def test_a_study_that_stops_early_hears_of_every_epoch(tmp_path, store):
    said = []
    study = study_of(tmp_path, store, stop_early=True)
    trial = run_trial(study, {}, open_storage(study.out), said.append)
    assert len(said) == 2
    assert said[-1] == trial.score


def test_a_grown_fusion_has_a_number_for_every_model_it_was_given(tmp_path, store):
    study = study_of(tmp_path, store, kind="orders", spaces=())
    storage = open_storage(study.out)
    grown = run_trial(study, {GROW: ["b", "a", "c"]}, storage)
    alone = run_trial(study, {"models": ["b"]}, storage)
    assert len(grown.steps) == 3
    assert grown.steps[0] == alone.metrics
    assert grown.steps[-1] == grown.metrics


def test_static_settings_rank_every_query(tmp_path, store):
    study = study_of(tmp_path, store, kind="static", spaces=({"system": ("rrf",)},))
    storage = open_storage(study.out)
    trial = run_trial(study, {"system": "rrf", "k": 5}, storage)
    values = values_of(study, trial, storage)
    assert len(values) == 90
    assert 100 * values.mean() == pytest.approx(trial.score, abs=1e-4)
    missing = run_trial(study, {"system": "convex", "weights.z": 1}, storage)
    assert "does not hold 'z'" in missing.failure


def test_static_systems_are_those_of_their_names(store):
    scores = np.stack([store.scores(name, 0) for name in MODELS]).astype(np.float32)
    rows = np.arange(scores.shape[1])
    near, far = (static_system(store, {"system": "rrf", "k": k})(scores, rows) for k in (1, 1000))
    assert not np.array_equal(near.argsort(axis=1), far.argsort(axis=1))
    one = static_system(store, {"system": "convex", "weights.b": 3.0})
    assert np.array_equal(one(scores, rows).argsort(axis=1), scores[1].argsort(axis=1))
    banked = static_system(store, {"strength": 0.5})
    assert banked.name == "mean@zscore+bank"


def test_a_validation_store_is_what_a_choice_is_reported_on(tmp_path, store):
    dataset = labelled_dataset(50, 40, seed=9, split="test")
    other = score_store(tmp_path / "test", dataset, MODELS, Grid(64, 45, 60))
    fusion = {"store": store.uri, "validation": other.uri, **FUSED}
    study = study_of(tmp_path, store, fusion=fusion)
    assert study.base.protocol == "train->val"
    assert not deciding(study, study.base)[0].hidden
    assert [found.uri for found in reporting(study, study.base)] == [other.uri]
    lattice = replace(study, kind="orders", spaces=())
    trial = run_trial(lattice, {"models": ["a", "c"]}, open_storage(study.out))
    assert trial.reported is not None
    assert trial.reported != trial.metrics
    assert open_stores(study.base)[0].uri == store.uri
