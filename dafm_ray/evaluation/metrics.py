"""Ranks of targets and integer hits, with the luck of ties made visible.

A candidate whose score is NaN was not scored or is masked: it is in no ranking. Among equal scores
the stored order of the gallery decides, the same for every system; beside it stand the best case,
the worst case and the expectation under a random order of ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

UNRANKED = np.iinfo(np.int64).max
"""Rank of a target that was not scored, or of a query without targets: never a hit."""

BLOCK_SCORES = 2**17
"""Scores that are compared at a time: as many as stay in a core's cache."""


@dataclass(frozen=True)
class TargetRanks:
    """Where the best target of each query stands, 1-based.

    Attributes:
        stored: (Q,) rank with ties in stored order.
        above: (Q,) candidates with a strictly higher score than the best target.
        tied_others: (Q,) non-targets with exactly its score.
        tied_targets: (Q,) targets with exactly its score, itself included.
        all_targets: (Q, T) stored rank of every target, `UNRANKED` where there is none.
        targets: (Q,) number of targets, ranked or not.
    """

    stored: Ints
    above: Ints
    tied_others: Ints
    tied_targets: Ints
    all_targets: Ints
    targets: Ints

    @property
    def best(self) -> Ints:
        """(Q,) rank if every tie fell in the target's favour."""
        return np.where(self.stored == UNRANKED, UNRANKED, self.above + 1)

    @property
    def worst(self) -> Ints:
        """(Q,) rank if every tie fell against it."""
        return np.where(self.stored == UNRANKED, UNRANKED, self.above + self.tied_others + 1)

    def expected_hits(self, k: int) -> Floats:
        """(Q,) probability of a hit at `k` under a random order of ties.

        Of `tied_others + tied_targets` equal candidates the first `k - above` are drawn.
        """
        left_Q = np.where(self.best <= k, k - self.above, 0)
        return random_hits(self.tied_others + self.tied_targets, self.tied_targets, left_Q)

    def average_precision(self, k: int) -> Floats:
        """(Q,) AP@k as CIRCO: sum over hits of precision at the hit / min(k, number of targets)."""
        ranks_QT = np.sort(self.all_targets, axis=1)
        found_T = np.arange(1, ranks_QT.shape[1] + 1)
        precision_QT = np.where(ranks_QT <= k, found_T / np.maximum(ranks_QT, 1), 0.0)
        average: Floats = precision_QT.sum(axis=1) / np.clip(self.targets, 1, k)
        return average

    def select(self, queries: Ints) -> "TargetRanks":
        """The ranks of some queries."""
        return TargetRanks(*(getattr(self, field.name)[queries] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence["TargetRanks"]) -> "TargetRanks":
        """Join blocks of queries."""
        width = max(part.all_targets.shape[1] for part in parts)
        columns = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(TargetRanks)
            if field.name != "all_targets"
        }
        padded = [
            np.pad(
                part.all_targets,
                ((0, 0), (0, width - part.all_targets.shape[1])),
                constant_values=UNRANKED,
            )
            for part in parts
        ]
        return TargetRanks(**columns, all_targets=np.concatenate(padded))


def random_hits(candidates_Q: Ints, targets_Q: Ints, k_Q: Ints | int) -> Floats:
    """(Q,) probability that the first K of so many candidates in random order hold a target.

    1 - C(n - t, K) / C(n, K) = 1 - product over i < t of (1 - K / (n - i)), in logarithms: neither
    large galleries nor small probabilities lose digits.

    Args:
        candidates_Q: n, the targets among them.
        targets_Q: t.
        k_Q: K, of every query or of all.
    """
    missed_Q = np.zeros(len(candidates_Q))
    for i in range(targets_Q.max(initial=0)):
        share_Q = np.minimum(k_Q / np.maximum(candidates_Q - i, 1), 1.0)
        with np.errstate(divide="ignore"):
            missed_Q += np.where(i < targets_Q, np.log1p(-share_Q), 0.0)
    hit_Q: Floats = 0.0 - np.expm1(missed_Q)
    return hit_Q


def rank_targets(scores_QN: Scores, targets_QT: Ints) -> TargetRanks:
    """Rank the targets of each query.

    Args:
        scores_QN: columns in stored order; NaN takes a candidate out.
        targets_QT: columns of the targets, -1 where a query has fewer than T.
    """
    rows_Q1 = np.arange(len(scores_QN))[:, None]
    target_scores_QT = np.where(targets_QT >= 0, scores_QN[rows_Q1, targets_QT], np.nan)
    ranked_QT = ~np.isnan(target_scores_QT)
    above_QT, tied_QT, before_QT = np.zeros((3, *targets_QT.shape), dtype=np.int64)
    step = max(1, BLOCK_SCORES // scores_QN.shape[1])
    for start in range(0, len(scores_QN), step):
        scores_BN = scores_QN[start : start + step]
        rows = slice(start, start + len(scores_BN))
        for t in range(targets_QT.shape[1]):
            score_B1 = target_scores_QT[rows, t, None]
            above_QT[rows, t] = _count(scores_BN > score_B1)
            equal_BN = scores_BN == score_B1
            tied_QT[rows, t] = _count(equal_BN)
            for b in np.flatnonzero(tied_QT[rows, t] > 1):
                before_QT[start + b, t] = np.count_nonzero(equal_BN[b, : targets_QT[start + b, t]])
    stored_QT = above_QT + before_QT + 1
    stored_QT[~ranked_QT] = UNRANKED
    above_QT[~ranked_QT] = UNRANKED
    best_Q1 = above_QT.argmin(axis=1)[:, None]
    ranked_Q = ranked_QT.any(axis=1)
    best_score_Q1 = np.take_along_axis(target_scores_QT, best_Q1, axis=1)
    tied_targets_Q = (target_scores_QT == best_score_Q1).sum(axis=1)
    tied_Q = np.take_along_axis(tied_QT, best_Q1, axis=1)[:, 0]
    return TargetRanks(
        stored=stored_QT.min(axis=1),
        above=np.where(ranked_Q, above_QT.min(axis=1), 0),
        tied_others=np.where(ranked_Q, tied_Q - tied_targets_Q, 0),
        tied_targets=np.where(ranked_Q, tied_targets_Q, 0),
        all_targets=stored_QT,
        targets=(targets_QT >= 0).sum(axis=1),
    )


def _count(mask_QN: NDArray[np.bool_]) -> Ints:
    """(Q,) number of True; summing bytes into small numbers is fastest by far."""
    small = np.min_scalar_type(mask_QN.shape[1])
    counts: Ints = mask_QN.view(np.uint8).sum(axis=1, dtype=small).astype(np.int64)
    return counts


def subset_ranks(scores_QN: Scores, targets_QT: Ints, groups_QG: Ints) -> TargetRanks:
    """Rank the targets among the members of each query's group (Rsubset).

    Args:
        scores_QN: as in `rank_targets`; the reference is NaN under the mask policy.
        targets_QT: as in `rank_targets`.
        groups_QG: columns of the members, -1 where a group has fewer than G.
    """
    members_QG, scores_QG = group_scores(scores_QN, groups_QG)
    match_QTG = (targets_QT[:, :, None] == members_QG[:, None, :]) & (targets_QT >= 0)[:, :, None]
    places_QT = np.where(match_QTG.any(axis=2), match_QTG.argmax(axis=2), -1)
    return rank_targets(scores_QG, places_QT)


def group_scores(scores_QN: Scores, groups_QG: Ints) -> tuple[Ints, Scores]:
    """The members of each query's group in stored order, and their scores.

    Args:
        scores_QN: as in `rank_targets`.
        groups_QG: columns of the members, -1 where a group has fewer than G.

    Returns:
        (Q, G) columns and (Q, G) scores, NaN where there is no member.
    """
    members_QG = np.sort(groups_QG, axis=1)
    rows_Q1 = np.arange(len(scores_QN))[:, None]
    return members_QG, np.where(members_QG >= 0, scores_QN[rows_Q1, members_QG], np.nan)


def stratified_mean(values_Q: Floats, strata_Q: Ints | None = None) -> float:
    """Mean over strata of the mean over their queries.

    Args:
        values_Q: per query; NaN where a query does not count.
        strata_Q: label of each query's stratum; one stratum by default.
    """
    if strata_Q is None:
        return float(np.nanmean(values_Q))
    counted = ~np.isnan(values_Q)
    labels = np.unique(strata_Q[counted])
    return float(np.mean([values_Q[counted & (strata_Q == label)].mean() for label in labels]))


def columns_of(ids: Sequence[Sequence[str]], positions: dict[str, int]) -> Ints:
    """Rows of gallery ids -> (rows, longest) positions, -1 where a row is shorter."""
    width = max((len(row) for row in ids), default=0)
    padded = np.full((len(ids), max(width, 1)), -1, dtype=np.int64)
    for r, row in enumerate(ids):
        padded[r, : len(row)] = [positions[id] for id in row]
    return padded
