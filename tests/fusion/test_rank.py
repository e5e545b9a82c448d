import numpy as np
import pytest

from dafm_ray.evaluation.protocols import protocol
from dafm_ray.fusion import rank
from dafm_ray.fusion.rank import masked_scores, rank_systems, scores_of, singles, top_candidates
from dafm_ray.fusion.static import static_fusion
from dafm_ray.progress import progress
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_matrix, score_store


def ranked(store):
    systems = [*singles(store), static_fusion("mean"), static_fusion("rrf")]
    with progress("test", 1) as shown:
        return rank_systems(store, systems, protocol("cirr"), shown)


@pytest.fixture
def dataset():
    return labelled_dataset(23, 17)


def test_chunks_give_every_query_once_with_excluded_candidates_missing(tmp_path, dataset):
    store = score_store(tmp_path, dataset)
    expected = np.stack([score_matrix(dataset, m) for m in (0, 1)])
    seen = []
    for chunk in masked_scores(store):
        for row, q in enumerate(chunk.rows):
            seen.append(q)
            excluded = [dataset.gallery.position(id) for id in dataset.queries[q].excluded]
            wanted = expected[:, q].copy()
            wanted[:, excluded] = np.nan
            assert np.array_equal(chunk.scores_MBN[:, row], wanted, equal_nan=True)
    assert seen == list(range(17))


def test_scores_of_any_queries_are_those_of_the_chunks(tmp_path, dataset):
    store = score_store(tmp_path, dataset)
    whole = np.concatenate([chunk.scores_MBN for chunk in masked_scores(store)], axis=1)
    rows = np.array([16, 0, 3, 4, 9, 3])
    assert np.array_equal(scores_of(store, rows), whole[:, rows], equal_nan=True)


def test_ranks_do_not_depend_on_tiles_or_chunks(tmp_path, dataset, monkeypatch):
    first = ranked(score_store(tmp_path / "a", dataset, grid=Grid(4, 5, 7)))
    monkeypatch.setattr(rank, "CHUNK_SCORES", 1)
    second = ranked(score_store(tmp_path / "b", dataset, grid=Grid(4, 17, 23)))
    for one, other in zip(first, second, strict=True):
        assert one.ranks.stored.tolist() == other.ranks.stored.tolist()
        assert one.subset.stored.tolist() == other.subset.stored.tolist()


def test_kept_references_are_ranked(tmp_path):
    store = score_store(tmp_path, labelled_dataset(9, 4, policy="keep"))
    assert all(not np.isnan(chunk.scores_MBN).any() for chunk in masked_scores(store))


def test_top_candidates_break_ties_by_stored_order_and_leave_masked_ones_out():
    scores = np.array([[1, 3, 3, np.nan], [np.nan, np.nan, 5, np.nan]], dtype=np.float32)
    assert top_candidates(scores, 3).tolist() == [[1, 2, 0], [2, -1, -1]]


def test_top_candidates_of_rank_lists_break_ties_by_stored_order():
    scores = np.full((2, 9), np.nan, dtype=np.float32)
    scores[0, [2, 5, 7]] = 1, 3, 3
    assert top_candidates(scores, 2).tolist() == [[5, 7], [-1, -1]]
    assert top_candidates(scores, 4).tolist() == [[5, 7, 2, -1], [-1, -1, -1, -1]]
