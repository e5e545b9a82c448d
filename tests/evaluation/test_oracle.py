import numpy as np

from dafm_ray.evaluation.metrics import UNRANKED, rank_targets, subset_ranks
from dafm_ray.evaluation.oracle import best_of
from dafm_ray.evaluation.summary import SystemRanks


def system(name, seed, groups=True):
    scores_QN = np.random.default_rng(seed).standard_normal((20, 12))
    scores_QN[3, 0] = np.nan if seed else scores_QN[3, 0]
    targets_QT = np.zeros((20, 1), dtype=np.int64)
    groups_QG = np.tile(np.arange(5), (20, 1))
    within = subset_ranks(scores_QN, targets_QT, groups_QG) if groups else None
    return SystemRanks(name, "single", rank_targets(scores_QN, targets_QT), within)


def test_every_query_has_its_best_rank():
    systems = [system("a", 0), system("b", 1), system("c", 2)]
    found = best_of(systems, "oracle")
    assert found.kind == "oracle"
    for own, each in (
        (found.ranks, [s.ranks for s in systems]),
        (found.subset, [s.subset for s in systems]),
    ):
        assert (own.stored == np.min([one.stored for one in each], axis=0)).all()
        chosen = [next(one for one in each if one.stored[q] == own.stored[q]) for q in range(20)]
        assert own.above.tolist() == [one.above[q] for q, one in enumerate(chosen)]


def test_a_target_that_one_system_did_not_score_is_ranked_by_the_other():
    systems = [system("b", 1), system("a", 0)]
    assert systems[0].ranks.stored[3] == UNRANKED
    assert best_of(systems, "oracle").ranks.stored[3] == systems[1].ranks.stored[3]


def test_groups_are_ranked_where_every_system_ranks_them():
    assert best_of([system("a", 0), system("b", 1, groups=False)], "oracle").subset is None
