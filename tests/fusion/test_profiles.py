import numpy as np
import pytest

from dafm_ray.fusion import profiles as module
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.profiles import Profiles, project
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

DATASET = labelled_dataset(30, 200)


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "store", DATASET, signal=1.5)


def correlations(store, rows):
    """(M, N, N) exact correlations of the candidates' columns of z-scores."""
    whole = np.concatenate([zscore(chunk.scores_MBN) for chunk in masked_scores(store)], axis=1)
    return np.stack([np.corrcoef(np.nan_to_num(part[rows]).T) for part in whole])


def test_profiles_approach_the_correlations_of_the_columns(store, monkeypatch):
    monkeypatch.setattr(module, "SIZE", 4000)
    fold_of = grouped_folds(store.queries, 4)
    found = Profiles(project(store, fold_of))
    references = np.arange(30)
    for own, held_out in ((1, 3), (2, 2), (-1, -1)):
        alike = found.similarities(references, np.full(30, own), held_out)
        kept = np.flatnonzero((fold_of != own) & (fold_of != held_out))
        assert np.abs(alike - correlations(store, kept)).max() < 0.1
        assert np.allclose(np.diagonal(alike, axis1=1, axis2=2), 1, atol=1e-5)


def test_tiles_and_the_order_of_the_folds_do_not_matter(store, tmp_path):
    fold_of = grouped_folds(store.queries, 4)
    other = score_store(tmp_path / "other", DATASET, signal=1.5, grid=Grid(8, 64, 50))
    one, two = Profiles(project(store, fold_of)), Profiles(project(other, fold_of))
    assert np.allclose(one.without(1, 2), two.without(2, 1), atol=1e-4)
    turned = Profiles(project(store, 3 - fold_of))
    assert np.allclose(one.without(1, 2), turned.without(1, 2), atol=1e-4)


def test_a_reference_outside_the_gallery_resembles_nothing(store):
    found = Profiles(project(store, grouped_folds(store.queries, 4)))
    alike = found.similarities(np.array([-1, 4]), np.array([0, 0]), -1)
    assert np.isnan(alike[:, 0]).all()
    assert np.isfinite(alike[:, 1]).all()


def test_the_cache_is_bounded(store, monkeypatch):
    found = Profiles(project(store, grouped_folds(store.queries, 4)))
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * found.sums_FMND[0].nbytes)
    first = found.without(0).copy()
    for fold in range(4):
        for other in range(4):
            found.without(fold, other)
    assert len(found._known) == 3
    assert np.array_equal(found.without(0), first)
