import itertools
import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafm_ray.datasets.base import Gallery
from dafm_ray.evaluation import metrics
from dafm_ray.evaluation.metrics import (
    UNRANKED,
    TargetRanks,
    columns_of,
    random_hits,
    rank_targets,
    subset_ranks,
)
from dafm_ray.fusion.normalise import zscore

SETS = ["cirr_val", "fiq_val_dress", "fiq_val_shirt", "fiq_val_toptee"]
MODELS = {"bge": "bge", "minilm": "minilm", "colbert": "colbert", "bm25": "bm25"}


@pytest.mark.parametrize("name", SETS)
def test_hits_of_real_label_matrices(golden, name):
    labels = np.load(golden / "metrics" / f"{name}.npz")["labels"]
    expected = json.loads((golden / "metrics" / "expected.json").read_text())[name]
    scores = np.tile(np.arange(labels.shape[1], 0, -1, dtype=np.float32), (len(labels), 1))
    targets = np.where(labels.any(axis=1), labels.argmax(axis=1), -1)[:, None]
    ranks = rank_targets(scores, targets)
    assert (ranks.stored != UNRANKED).sum() == expected["targets_within_depth"]
    for column, hits in expected["hits"].items():
        k = int(column.removeprefix("R@"))
        assert int((ranks.stored <= k).sum()) == hits
        assert round(100 * hits / len(labels), 4) == expected["percent"][column]


@pytest.fixture(scope="module")
def real_scores(reference_material):
    folder = reference_material / "scores" / "cirr_val"
    ids, query_ids, rows, expected = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("gallery_ids", "query_ids", "queries", "expected")
    )
    by_id = {row["id"]: row for row in rows}
    queries = [by_id[id] for id in query_ids]
    gallery = Gallery.from_source({id: id for id in ids})
    positions = {id: n for n, id in enumerate(gallery.ids)}
    references = [positions[query["reference"]] for query in queries]
    scores = {}
    for name in MODELS:
        matrix = np.load(folder / f"{name}.npy")[:, list(gallery.source_order)].astype(np.float32)
        matrix[np.arange(len(queries)), references] = np.nan
        scores[name] = matrix
    scores["mean_of_z_scores"] = zscore(np.stack(list(scores.values()))).mean(axis=0)
    targets = columns_of([query["targets"] for query in queries], positions)
    groups = columns_of([query["group"] for query in queries], positions)
    return scores, targets, groups, expected["systems"]


@pytest.mark.parametrize("name", [*MODELS, "mean_of_z_scores"])
def test_every_luck_on_real_scores_with_ties(real_scores, name):
    scores, targets, groups, expected = real_scores
    whole = rank_targets(scores[name], targets)
    subset = subset_ranks(scores[name], targets, groups)
    for column, counts in expected[name].items():
        ranks, k = (subset if "subset" in column else whole), int(column.split("@")[1])
        found = {
            "best": int((ranks.best <= k).sum()),
            "worst": int((ranks.worst <= k).sum()),
            "hash": int((ranks.stored <= k).sum()),
            "expected": round(float(ranks.expected_hits(k).sum()), 3),
        }
        assert found == counts, column


def brute_force(scores, targets, k):
    """Hits at k over all orders of ties: (stored, best, worst, expected)."""
    present = [n for n in range(len(scores)) if not np.isnan(scores[n])]
    levels = [
        [n for n in present if scores[n] == level]
        for level in sorted({scores[n] for n in present}, reverse=True)
    ]
    rankings = [
        list(itertools.chain(*orders))
        for orders in itertools.product(*(itertools.permutations(level) for level in levels))
    ]
    hits = [any(n in targets for n in ranking[:k]) for ranking in rankings]
    stored = list(itertools.chain(*levels))
    return any(n in targets for n in stored[:k]), max(hits), min(hits), sum(hits) / len(hits)


@settings(max_examples=150)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), min_size=2, max_size=6),
    st.data(),
)
def test_equals_all_orders_of_ties(scores, data):
    targets = data.draw(st.sets(st.integers(0, len(scores) - 1), max_size=3))
    k = data.draw(st.integers(1, len(scores)))
    columns = np.array([[*targets, *([-1] * (3 - len(targets)))]])
    ranks = rank_targets(np.array([scores], dtype=np.float32), columns)
    stored, best, worst, expected = brute_force(np.array(scores), targets, k)
    assert bool(ranks.stored[0] <= k) == stored
    assert bool(ranks.best[0] <= k) == best
    assert bool(ranks.worst[0] <= k) == worst
    assert ranks.expected_hits(k)[0] == pytest.approx(expected)


@given(st.integers(0, 10_000))
def test_metrics_do_not_depend_on_the_order_of_the_source(seed):
    rng = np.random.default_rng(seed)
    names = [f"i{n}" for n in range(12)]
    scores = {name: float(rng.integers(0, 4)) for name in names}
    found = []
    for _ in range(3):
        gallery = Gallery.from_source({names[n]: "" for n in rng.permutation(12)})
        row = np.array([[scores[id] for id in gallery.ids]], dtype=np.float32)
        found.append(rank_targets(row, np.array([[gallery.position("i3")]])).stored[0])
    assert len(set(found)) == 1


@given(st.integers(1, 7), st.data())
def test_a_random_order_hits_as_often_as_all_orders_do(candidates, data):
    targets = data.draw(st.integers(0, candidates))
    k = data.draw(st.integers(1, 9))
    firsts = list(itertools.combinations(range(candidates), min(k, candidates)))
    expected = sum(min(first) < targets for first in firsts) / len(firsts)
    [found] = random_hits(np.array([candidates]), np.array([targets]), k)
    assert found == pytest.approx(expected, abs=1e-12)


@given(
    st.lists(st.tuples(st.integers(1, 30_000), st.integers(0, 40)), min_size=1, max_size=5),
    st.integers(1, 50),
)
def test_a_random_order_hits_as_the_formula_says(sizes, k):
    candidates = np.array([n for n, _ in sizes])
    targets = np.array([min(n, t) for n, t in sizes])
    found = random_hits(candidates, targets, k)
    for n, t, p in zip(candidates.tolist(), targets.tolist(), found, strict=True):
        missed = Fraction(comb(n - t, k), comb(n, k)) if k <= n else Fraction(t == 0)
        assert p == pytest.approx(float(1 - missed), rel=1e-11)
        assert 0 <= p <= 1
        if t and k >= n - t + 1:
            assert p == 1
    assert (random_hits(candidates, targets, k + 1) >= found).all()
    assert (random_hits(candidates + 1, targets, k) <= found).all()


def test_scores_that_are_all_equal_hit_as_a_random_order_does():
    """Of the candidates that are ranked: one is masked, one target of two was not scored."""
    scores = np.zeros((2, 9), dtype=np.float32)
    scores[0, 3] = scores[1, [3, 5]] = np.nan
    ranks = rank_targets(scores, np.array([[0, 1], [0, 5]]))
    expected = random_hits(np.array([8, 7]), np.array([2, 1]), 3)
    assert ranks.expected_hits(3) == pytest.approx(expected)
    assert expected == pytest.approx([1 - comb(6, 3) / comb(8, 3), 3 / 7])


def test_average_precision_as_circo_defines_it():
    scores = np.array([[6, 5, 4, 3, 2, 1]], dtype=np.float32)
    ranks = rank_targets(scores, np.array([[0, 3, 5, -1]]))
    assert ranks.average_precision(5)[0] == pytest.approx((1 / 1 + 2 / 4) / 3)
    assert ranks.average_precision(2)[0] == pytest.approx((1 / 1) / 2)
    assert ranks.average_precision(6)[0] == pytest.approx((1 + 2 / 4 + 3 / 6) / 3)


def test_average_precision_counts_targets_that_were_not_scored():
    ranks = rank_targets(np.array([[0.9, np.nan, 0.1]], dtype=np.float32), np.array([[0, 1]]))
    assert ranks.average_precision(5)[0] == pytest.approx(0.5)


def test_a_target_that_was_not_scored_is_never_a_hit():
    scores = np.full((1, 4), np.nan, dtype=np.float32)
    ranks = rank_targets(scores, np.array([[2]]))
    assert ranks.stored[0] == ranks.best[0] == ranks.worst[0] == UNRANKED
    assert ranks.expected_hits(4)[0] == 0


def test_the_subset_is_ranked_without_the_masked_reference():
    scores = np.array([[np.nan, 0.9, 0.8, 0.7, 0.6]], dtype=np.float32)
    ranks = subset_ranks(scores, np.array([[3]]), np.array([[0, 3, 2, -1]]))
    assert ranks.stored.tolist() == [2]


def test_blocks_of_queries_join():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (7, 9)).astype(np.float32)
    targets = np.array([[n, (n + 2) % 9] for n in range(7)])
    targets[3:, 1] = -1
    whole = rank_targets(scores, targets)
    parts = [rank_targets(scores[:3], targets[:3]), rank_targets(scores[3:], targets[3:, :1])]
    joined = TargetRanks.concatenate(parts)
    assert joined.stored.tolist() == whole.stored.tolist()
    assert joined.average_precision(5).tolist() == whole.average_precision(5).tolist()


def test_ranks_do_not_depend_on_how_many_scores_are_compared_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (9, 300)).astype(np.float32)
    targets = rng.permutation(300)[:18].reshape(9, 2)
    whole = rank_targets(scores, targets)
    monkeypatch.setattr(metrics, "BLOCK_SCORES", 700)
    assert rank_targets(scores, targets).all_targets.tolist() == whole.all_targets.tolist()
    assert rank_targets(scores, targets).tied_others.tolist() == whole.tied_others.tolist()
