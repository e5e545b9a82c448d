"""Static fusions against ranx, on real scores and on published rank lists.

Its ties: ranx sorts a run by score and lets its sort decide among equal scores, which on float16
matrices is most candidates; here the stored order decides. So where scores tie, reciprocal ranks
are compared twice: ranx must lie between our best and worst rank of each tied candidate, and
equal us exactly once the ties are broken in our order.
"""

import gzip
import json

import numpy as np
import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.fusion.normalise import ranks_of
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.static import RRF_K, static_fusion
from dafm_ray.tiles.ingest import ingest

pytestmark = pytest.mark.timeout(900)

ranx = pytest.importorskip("ranx")


def fused(scores_MBN, ids, queries, **how):
    """(B, N) scores of `ranx.fuse`; NaN where it has none."""
    column = {id: n for n, id in enumerate(ids)}
    runs = [
        ranx.Run(
            {
                query: {ids[n]: float(row[n]) for n in np.flatnonzero(~np.isnan(row))}
                for query, row in zip(queries, scores_BN, strict=True)
            }
        )
        for scores_BN in scores_MBN
    ]
    found = ranx.fuse(runs=runs, **how)
    scores = np.full(scores_MBN.shape[1:], np.nan)
    for b, query in enumerate(queries):
        for id, score in found.run[query].items():
            scores[b, column[id]] = score
    return scores


@pytest.fixture(scope="module")
def cirr_val(reference_material, tmp_path_factory):
    folder = reference_material / "scores" / "cirr_val"
    return ingest(str(folder), str(tmp_path_factory.mktemp("ranx") / "store")).store


def chunks(store, every):
    for chunk in masked_scores(store):
        rows = [b for b in range(len(chunk.rows)) if chunk.rows[b] % every == 0]
        if rows:
            queries = [store.queries[chunk.rows[b]].id for b in rows]
            yield chunk.scores_MBN[:, rows], queries


EVERY = [pytest.param(100, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", EVERY)
def test_combsum_of_minmax_scores_is_equal(cirr_val, every):
    ours = static_fusion("combsum@minmax")
    for scores_MBN, queries in chunks(cirr_val, every):
        theirs = fused(scores_MBN, cirr_val.gallery_ids, queries, norm="min-max", method="sum")
        np.testing.assert_allclose(ours(scores_MBN, np.zeros(1, dtype=np.int64)), theirs, atol=2e-6)


@pytest.mark.parametrize("every", EVERY)
def test_reciprocal_ranks_are_equal_but_for_ties(cirr_val, every):
    ours = static_fusion("rrf")
    how = {"norm": None, "method": "rrf", "params": {"k": RRF_K}}
    for scores_MBN, queries in chunks(cirr_val, every):
        theirs = fused(scores_MBN, cirr_val.gallery_ids, queries, **how)
        low, high = zip(*(bounds(scores_BN) for scores_BN in scores_MBN), strict=True)
        present = ~np.isnan(theirs)
        assert (np.sum(low, axis=0)[present] <= theirs[present] + 1e-7).all()
        assert (np.sum(high, axis=0)[present] >= theirs[present] - 1e-7).all()
        broken = -ranks_of(scores_MBN)
        theirs = fused(broken, cirr_val.gallery_ids, queries, **how)
        np.testing.assert_allclose(ours(scores_MBN, np.zeros(1, dtype=np.int64)), theirs, atol=1e-7)


def bounds(scores_BN):
    """Reciprocal ranks with every tie lost, and with every tie won."""
    low, high = np.full((2, *scores_BN.shape), np.nan)
    for b, row in enumerate(scores_BN):
        present = ~np.isnan(row)
        ordered = np.sort(row[present])
        count = len(ordered)
        best = 1 + count - np.searchsorted(ordered, row[present], side="right")
        worst = count - np.searchsorted(ordered, row[present], side="left")
        high[b, present] = 1 / (RRF_K + best)
        low[b, present] = 1 / (RRF_K + worst)
    return low, high


def test_four_published_systems_fuse_alike(reference_material, tmp_path):
    """Rank lists of 50 for all 4,148 test1 queries; lists have no ties, so all is equal."""
    folder = reference_material / "golden" / "rank_lists"
    named = DatasetConfig("cirr", "test1", annotations=str(reference_material / "data" / "cirr"))
    store = ingest(str(folder), str(tmp_path / "s"), named).store
    runs = []
    for model in store.models:
        lists = json.loads(gzip.decompress((folder / f"{model}.json.gz").read_bytes()))
        kept = {query: names for query, names in lists.items() if query.isdigit()}
        assert len(kept) == 4148
        runs.append(
            ranx.Run({query: {n: 1 / r for r, n in enumerate(ns, 1)} for query, ns in kept.items()})
        )
    theirs = ranx.fuse(runs=runs, norm=None, method="rrf", params={"k": RRF_K})
    rrf = static_fusion("rrf")
    for chunk in masked_scores(store):
        ours_BN = rrf(chunk.scores_MBN, np.array(chunk.rows))
        for row, ours in zip(chunk.rows, ours_BN, strict=True):
            found = theirs.run[store.queries[row].id]
            present = np.flatnonzero(~np.isnan(ours))
            assert {store.gallery_ids[n] for n in present} == set(found)
            expected = [found[store.gallery_ids[n]] for n in present]
            np.testing.assert_allclose(ours[present], expected, atol=1e-7)
