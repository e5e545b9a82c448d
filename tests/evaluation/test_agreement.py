"""Hits at 1, 5, 10 and 50 on real scores, equal to those of trec_eval and of ranx.

Their ties. trec_eval (pytrec_eval-terrier) ranks equal scores, which it reads as float32, by the id
of the document, descending. ranx has no rule: it sorts a run with numba's quicksort, which leaves
equal scores in any order. Ours is the stored order. So trec_eval is compared with our ranks of the
same scores stored in its order, and with those in ours under ids that descend with the stored
order; ranx with our best and worst luck, and exactly after ties are broken in our order.
"""

import json

import numpy as np
import pytest

from dafm_ray.datasets.base import Gallery
from dafm_ray.evaluation.metrics import rank_targets

pytrec_eval = pytest.importorskip("pytrec_eval")
ranx = pytest.importorskip("ranx")

MODELS = ["bge", "minilm", "colbert", "bm25"]
CUTOFFS = [1, 5, 10, 50]


@pytest.fixture(scope="module")
def cirr_val(reference_material):
    """Gallery ids and scores in stored order, references masked, and columns of the targets."""
    folder = reference_material / "scores" / "cirr_val"
    ids, query_ids, rows = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("gallery_ids", "query_ids", "queries")
    )
    by_id = {row["id"]: row for row in rows}
    queries = [by_id[id] for id in query_ids]
    gallery = Gallery.from_source({id: id for id in ids})
    references = [gallery.position(query["reference"]) for query in queries]
    targets = np.array([gallery.position(query["targets"][0]) for query in queries])
    scores = {}
    for name in MODELS:
        matrix = np.load(folder / f"{name}.npy")[:, list(gallery.source_order)].astype(np.float32)
        matrix[np.arange(len(queries)), references] = np.nan
        scores[name] = matrix
    return gallery.ids, scores, targets


def documents(scores, ids):
    """Of each query those that can be among its first 50, whoever breaks the ties, in stored order.

    Names of queries are numbers of equal length, so that sorting them changes nothing.
    """
    depth = scores.shape[1] - max(CUTOFFS)
    least = np.partition(np.nan_to_num(scores, nan=-np.inf), depth, axis=1)[:, depth]
    return {
        f"{q:04d}": {ids[n]: float(row[n]) for n in np.flatnonzero(row >= least[q])}
        for q, row in enumerate(scores)
    }


def relevant(targets, ids):
    return {f"{q:04d}": {ids[n]: 1} for q, n in enumerate(targets)}


def our_hits(ranks):
    return {k: ranks <= k for k in CUTOFFS}


def trec_eval_hits(run, qrels):
    measure = "success." + ",".join(map(str, CUTOFFS))
    found = pytrec_eval.RelevanceEvaluator(qrels, {measure}).evaluate(run)
    assert len(found) == len(run)
    return {k: np.array([found[q][f"success_{k}"] == 1 for q in run]) for k in CUTOFFS}


def ranx_hits(run, qrels):
    names = [f"hit_rate@{k}" for k in CUTOFFS]
    found = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names, return_mean=False)
    return {k: found[name] == 1 for k, name in zip(CUTOFFS, names, strict=True)}


@pytest.mark.parametrize("model", MODELS)
def test_hits_of_trec_eval_in_its_own_order_of_ties(cirr_val, model):
    ids, scores, targets = cirr_val
    order = np.argsort(ids)[::-1]
    ranks = rank_targets(scores[model][:, order], np.argsort(order)[targets][:, None])
    theirs = trec_eval_hits(documents(scores[model], ids), relevant(targets, ids))
    np.testing.assert_equal(theirs, our_hits(ranks.stored))


@pytest.mark.parametrize("model", MODELS)
def test_hits_of_trec_eval_under_ids_that_descend_in_stored_order(cirr_val, model):
    ids, scores, targets = cirr_val
    descending = [f"{len(ids) - n:04d}" for n in range(len(ids))]
    ranks = rank_targets(scores[model], targets[:, None])
    theirs = trec_eval_hits(documents(scores[model], descending), relevant(targets, descending))
    np.testing.assert_equal(theirs, our_hits(ranks.stored))


@pytest.mark.parametrize("model", MODELS)
def test_hits_of_ranx_lie_between_best_and_worst_luck(cirr_val, model):
    ids, scores, targets = cirr_val
    ranks = rank_targets(scores[model], targets[:, None])
    theirs = ranx_hits(documents(scores[model], ids), relevant(targets, ids))
    for k, hits in theirs.items():
        assert ((ranks.worst <= k) <= hits).all()
        assert (hits <= (ranks.best <= k)).all()


@pytest.mark.parametrize("model", MODELS)
def test_hits_of_ranx_once_ties_are_broken_in_stored_order(cirr_val, model):
    ids, scores, targets = cirr_val
    ranks = rank_targets(scores[model], targets[:, None])
    broken = {
        query: {id: -place for place, id in enumerate(sorted(found, key=found.get, reverse=True))}
        for query, found in documents(scores[model], ids).items()
    }
    theirs = ranx_hits(broken, relevant(targets, ids))
    np.testing.assert_equal(theirs, our_hits(ranks.stored))
