import numpy as np
import pytest

from dafm_ray.errors import ConfigError
from dafm_ray.fusion.bank import collect
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
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
    bank = collect(store, fold_of, t)
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
    one, two = collect(store, fold_of), collect(other, fold_of)
    assert np.array_equal(one.without(1), two.without(1))
    assert not np.array_equal(one.without(0), two.without(0))


def test_tiles_do_not_matter(store, tmp_path):
    fold_of = grouped_folds(store.queries, 3)
    other = score_store(tmp_path / "other", DATASET, signal=1.5, grid=Grid(4, 7, 9))
    one, two = collect(store, fold_of), collect(other, fold_of)
    assert np.allclose(one.without(), two.without(), atol=1e-6)
    assert one.digest == two.digest
    assert one.digest != collect(store, fold_of, t=2.0).digest


def test_wrong_settings_are_refused(store):
    with pytest.raises(ConfigError, match="above 0"):
        collect(store, np.zeros(30, dtype=np.int64), t=0.0)
    with pytest.raises(ConfigError, match="3 folds for 30 queries"):
        collect(store, np.zeros(3, dtype=np.int64))
