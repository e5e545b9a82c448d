import numpy as np
import pytest

from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.fusion.control import noisy_copies
from dafm_ray.fusion.rank import scores_of, singles
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store


@pytest.fixture
def store(tmp_path):
    dataset = labelled_dataset(300, 400)
    return score_store(tmp_path / "s", dataset, ("a", "b", "c"), Grid(64, 200, 300), signal=1.5)


def hits(store, system, k=10):
    rows = np.arange(store.size("queries"))
    targets = columns_of([query.targets for query in store.queries], store.positions)
    return int((rank_targets(system(scores_of(store, rows), rows), targets).stored <= k).sum())


def test_copies_hit_as_many_queries_as_the_models(store):
    copies = noisy_copies(store, 10)
    assert len(copies) == 3
    models = np.mean([hits(store, model) for model in singles(store)])
    assert np.mean([hits(store, copy) for copy in copies]) == pytest.approx(models, rel=0.1)
    assert hits(store, copies[0].system) > 1.2 * models


def test_copies_differ_and_a_query_has_the_same_noise_in_any_batch(store):
    one, other, _ = noisy_copies(store, 10)
    rows = np.arange(20)
    scores_MBN = scores_of(store, rows)
    whole = one(scores_MBN, rows)
    assert not np.array_equal(whole, other(scores_MBN, rows), equal_nan=True)
    some = np.array([7, 3])
    assert np.array_equal(one(scores_MBN[:, some], some), whole[some], equal_nan=True)
    assert (np.isnan(whole) == np.isnan(scores_MBN).all(axis=0)).all()
