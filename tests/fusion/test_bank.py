from dataclasses import replace

import numpy as np
import pytest

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.fusion.bank import Banked, bank_of_others, banked_convex, own_bank
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.static import Convex, Single, static_fusion
from dafm_ray.tiles.manifest import Grid
from tests import samples
from tests.samples import labelled_dataset, score_matrix, score_store

DATASET = labelled_dataset(40, 30)


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "store", DATASET, signal=1.5)


def z_scores(store):
    return np.concatenate([zscore(chunk.scores_MBN) for chunk in masked_scores(store)], axis=1)


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_a_folds_bank_is_the_formula_over_the_other_folds(store, t):
    fold_of = grouped_folds(store.queries, 3)
    bank = own_bank(store, fold_of, t)
    z = z_scores(store).astype(np.float64)
    for fold in range(3):
        by_hand = np.log(np.nanmean(np.exp(t * z[:, fold_of != fold]), axis=1)) / t
        assert np.allclose(bank.without(fold), by_hand, atol=1e-6)
    alone = np.log(np.nanmean(np.exp(t * z[:, fold_of == 2]), axis=1)) / t
    assert np.allclose(bank.without(0, 1), alone, atol=1e-6)
    everything = np.log(np.nanmean(np.exp(t * z), axis=1)) / t
    assert np.allclose(bank.without(), everything, atol=1e-6)


def test_a_query_leaves_no_trace_in_the_bank_of_its_own_fold(store, tmp_path, monkeypatch):
    fold_of = grouped_folds(store.queries, 3)
    held_out = np.flatnonzero(fold_of == 1)

    def louder(*given):
        scores = score_matrix(*given)
        scores[held_out, :5] += 40
        return scores

    monkeypatch.setattr(samples, "score_matrix", louder)
    other = score_store(tmp_path / "other", DATASET, signal=1.5)
    one, two = own_bank(store, fold_of, 1.0), own_bank(other, fold_of, 1.0)
    assert np.array_equal(one.without(1), two.without(1))
    assert not np.array_equal(one.without(0), two.without(0))


def test_tiles_do_not_matter(store, tmp_path):
    fold_of = grouped_folds(store.queries, 3)
    other = score_store(tmp_path / "other", DATASET, signal=1.5, grid=Grid(4, 7, 9))
    one, two = own_bank(store, fold_of, 1.0), own_bank(other, fold_of, 1.0)
    assert np.allclose(one.without(), two.without(), atol=1e-6)
    assert one.digest == two.digest
    assert one.digest != own_bank(store, fold_of, 2.0).digest


def test_wrong_settings_are_refused(store):
    with pytest.raises(ConfigError, match="above 0"):
        own_bank(store, np.zeros(30, dtype=np.int64), 0.0)
    with pytest.raises(ConfigError, match="3 folds for 30 queries"):
        own_bank(store, np.zeros(3, dtype=np.int64), 1.0)


def test_a_bank_is_kept_with_the_store_and_found_there_again(store):
    fold_of = grouped_folds(store.queries, 3)
    one = own_bank(store, fold_of, 1.0, profiles=True)
    kept = store.storage.list("banks")
    assert len(kept) == 2
    again = own_bank(type(store)(store.uri), fold_of, 1.0, profiles=True)
    assert np.array_equal(one.without(1), again.without(1))
    assert np.array_equal(one.profiles.without(1), again.profiles.without(1))
    assert store.storage.list("banks") == kept
    assert not [problem for _, problem in store.verify() if problem]


def test_a_damaged_bank_is_made_again(store):
    fold_of = grouped_folds(store.queries, 3)
    one = own_bank(store, fold_of, 1.0)
    [path] = store.storage.list("banks")
    file = store.storage.root / path
    data = bytearray(file.read_bytes())
    data[-200] ^= 1
    file.write_bytes(data)
    again = own_bank(type(store)(store.uri), fold_of, 1.0)
    assert np.array_equal(one.without(1), again.without(1))


def test_a_bank_goes_when_an_image_is_encoded_again(store):
    own_bank(store, grouped_folds(store.queries, 3), 1.0)
    store.forget("gallery", 0)
    assert not [key for key in store.finished() if key.startswith("banks/")]


def test_queries_of_another_store_can_be_the_bank(store, tmp_path):
    others = labelled_dataset(40, 30, seed=5)
    renamed = tuple(replace(query, id=f"log-{query.id}") for query in others.queries)
    log = score_store(tmp_path / "log", replace(others, queries=renamed), seed=3, signal=1.5)
    bank = bank_of_others(store, log, 1.0)
    z = z_scores(log).astype(np.float64)
    by_hand = np.log(np.nanmean(np.exp(z), axis=1))
    rows = np.array([0, 7, -1])
    assert np.allclose(bank.hubs(rows), by_hand[:, None], atol=1e-6)
    assert "none of the queries ranked" in bank.note
    with pytest.raises(DataError, match="must not be in its own bank"):
        bank_of_others(store, store, 1.0)
    elsewhere = score_store(tmp_path / "e", labelled_dataset(41, 30, split="x"))
    with pytest.raises(DataError, match="another gallery"):
        bank_of_others(store, elsewhere, 1.0)


def test_a_hub_loses_and_strength_0_changes_nothing(store):
    bank = own_bank(store, grouped_folds(store.queries, 3), 1.0)
    [chunk] = list(masked_scores(store))[:1]
    rows = np.array(chunk.rows)
    plain = static_fusion("mean")
    same = Banked(plain, bank, 0.0)(chunk.scores_MBN, rows)
    assert np.allclose(same, plain(chunk.scores_MBN, rows), atol=1e-5, equal_nan=True)
    moved = Banked(Single("a", 0), bank, 1.0)(chunk.scores_MBN, rows)
    expected = zscore(chunk.scores_MBN)[0] - bank.hubs(rows)[0]
    assert np.allclose(moved, expected, atol=1e-6, equal_nan=True)
    assert Banked(plain, bank, 1.0).name == "mean@zscore+bank"


def test_convex_weights_take_the_corrected_scores_as_they_are(store):
    bank = own_bank(store, grouped_folds(store.queries, 3), 1.0)
    chunk = next(masked_scores(store))
    rows = np.array(chunk.rows)
    convex = Convex({"a": 0.7, "b": 0.3}, "val")
    z, hubs = zscore(chunk.scores_MBN), bank.hubs(rows)
    by_hand = np.tensordot(np.array([0.7, 0.3], np.float32), z - 0.5 * hubs, axes=1)
    found = banked_convex(convex, bank, 0.5)
    assert np.allclose(found(chunk.scores_MBN, rows), by_hand, atol=1e-5, equal_nan=True)
    assert found.name == "convex@zscore+bank"
