"""P6: CIRR's recalls from scores in memory, against sorting and comparing the names of images.

The published evaluations sort the candidates of every query, look up their names, delete the
reference, compare with the target, and keep the members of the query's group, all as strings.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import ratio
from dafm_ray.evaluation.metrics import Ints, Scores, rank_targets, subset_ranks

Names = NDArray[np.str_]

QUERIES, CANDIDATES, GROUP = 4181, 2297, 6
RECALLS, SUBSET_RECALLS = (1, 5, 10, 50), (1, 2, 3)


def run() -> float:
    """Ratio of the published evaluation to ours."""
    rng = np.random.default_rng(0)
    # Distinct in every row, and exact after 1 - score: no ties, which the two would break unlike.
    similarities = np.tile(np.arange(CANDIDATES, dtype=np.float32) / 4096, (QUERIES, 1))
    scores_QN = rng.permuted(similarities, axis=1)
    masked_QN = scores_QN.copy()
    groups_QG = np.argsort(rng.random(scores_QN.shape, dtype=np.float32), axis=1)[:, :GROUP]
    names = np.array([f"dev-{n}-{n % 4}-img{n % 2}" for n in range(CANDIDATES)])

    def ours() -> list[int]:
        return _hits(masked_QN, groups_QG)

    def theirs() -> list[int]:
        return _published_hits(scores_QN, names, names[groups_QG])

    assert ours() == theirs()
    return ratio(ours, theirs)


def _hits(scores_QN: Scores, groups_QG: Ints) -> list[int]:
    """Ours; the first of a group is the reference, the second the target."""
    targets_QT = groups_QG[:, 1:2]
    scores_QN[np.arange(len(scores_QN)), groups_QG[:, 0]] = np.nan
    ranks_Q = rank_targets(scores_QN, targets_QT).stored
    subset_Q = subset_ranks(scores_QN, targets_QT, groups_QG).stored
    return [int((ranks_Q <= k).sum()) for k in RECALLS] + [
        int((subset_Q <= k).sum()) for k in SUBSET_RECALLS
    ]


def _published_hits(scores_QN: Scores, names: Names, groups: Names) -> list[int]:
    order = torch.argsort(1 - torch.from_numpy(scores_QN), dim=-1)
    sorted_names = names[order.numpy()]
    references = np.repeat(groups[:, 0], CANDIDATES).reshape(QUERIES, -1)
    sorted_names = sorted_names[sorted_names != references].reshape(QUERIES, CANDIDATES - 1)
    targets = np.repeat(groups[:, 1], CANDIDATES - 1).reshape(QUERIES, -1)
    labels = sorted_names == targets
    in_group = (sorted_names[..., None] == groups[:, None, :]).sum(-1).astype(bool)
    group_labels = labels[in_group].reshape(QUERIES, -1)
    return [int(labels[:, :k].sum()) for k in RECALLS] + [
        int(group_labels[:, :k].sum()) for k in SUBSET_RECALLS
    ]
