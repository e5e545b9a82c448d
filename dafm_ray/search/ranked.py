"""Rankings from an index, and the ranks of targets among the candidates that it returned."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dafm_ray.datasets.base import Dataset, Query
from dafm_ray.evaluation.metrics import Ints, Scores, TargetRanks, columns_of, rank_targets
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.search.index import Floats, Index


def first_candidates(
    index: Index, features_BD: Floats, excluded_BX: Ints, top: int
) -> tuple[Ints, Floats]:
    """The first candidates of each query that are not excluded.

    Args:
        index: of the gallery.
        features_BD: NaN for queries that could not be encoded.
        excluded_BX: columns of the index, -1 where a query has fewer than X.
        top: candidates a query, or all that are left.

    Returns:
        (B, top) columns, -1 behind the last, and their scores.
    """
    asked = min(len(index.ids), top + excluded_BX.shape[1])
    columns_BK = np.full((len(features_BD), top), -1, np.int64)
    scores_BK = np.full((len(features_BD), top), np.nan, np.float32)
    usable = np.flatnonzero(~np.isnan(features_BD).any(axis=1))
    found = index.search(features_BD[usable], asked)
    for b, scores, columns in zip(usable, *found, strict=True):
        kept = np.flatnonzero(~np.isin(columns, excluded_BX[b]))[:top]
        columns_BK[b, : len(kept)], scores_BK[b, : len(kept)] = columns[kept], scores[kept]
    return columns_BK, scores_BK


class Ranked:
    """Ranks of the labelled queries, batch by batch."""

    def __init__(self, index: Index, dataset: Dataset) -> None:
        self.index = index
        self.rules = rules = protocol(dataset.protocol)
        self.labelled = [query for query in dataset.queries if query.targets]
        self.grouped = bool(rules.subset_recalls) and all(
            set(query.group) & set(query.targets) for query in self.labelled
        )
        # Images that could not be used stand behind the last column, and have no score.
        self.columns = dict.fromkeys(dataset.gallery.ids, len(index.ids))
        self.columns.update({id: n for n, id in enumerate(index.ids)})
        self._ranks: list[TargetRanks] = []
        self._subsets: list[TargetRanks] = []

    def excluded(self, queries: Sequence[Query]) -> Ints:
        """(B, X) columns of the excluded candidates."""
        return columns_of([query.excluded for query in queries], self.columns)

    def add(
        self, queries: Sequence[Query], features_BD: Floats, columns_BK: Ints, scores_BK: Floats
    ) -> None:
        """Rank the targets of a batch among its first candidates, and within its groups."""
        labelled = np.flatnonzero([bool(query.targets) for query in queries])
        if not len(labelled):
            return
        queries = [query for query in queries if query.targets]
        targets_BT = columns_of([query.targets for query in queries], self.columns)
        columns_BK, scores_BK = columns_BK[labelled], scores_BK[labelled]
        self._ranks.append(_ranks(columns_BK, scores_BK, targets_BT))
        if self.grouped:
            groups_BG = columns_of([query.group for query in queries], self.columns)
            scores_BG = self._group_scores(features_BD[labelled], groups_BG, queries)
            self._subsets.append(_ranks(groups_BG, scores_BG, targets_BT))

    def _group_scores(
        self, features_BD: Floats, groups_BG: Ints, queries: Sequence[Query]
    ) -> Scores:
        excluded_BX = self.excluded(queries)
        gone_BG = (groups_BG[:, :, None] == excluded_BX[:, None, :]).any(axis=2)
        asked_BG = np.where(gone_BG | (groups_BG == len(self.index.ids)), -1, groups_BG)
        scores_BG = np.full(groups_BG.shape, np.nan, np.float32)
        usable = ~np.isnan(features_BD).any(axis=1)
        scores_BG[usable] = self.index.scores(features_BD[usable], asked_BG[usable])
        return scores_BG

    def counted(self, top: int) -> dict[str, Any]:
        """Counts and percents of what the first `top` decide."""
        if not self.labelled:
            return {"queries": 0, "hits": {}, "metrics": {}}
        rules = replace(
            self.rules,
            recalls=tuple(k for k in self.rules.recalls if k <= top),
            average_precisions=tuple(k for k in self.rules.average_precisions if k <= top),
        )
        subset = TargetRanks.concatenate(self._subsets) if self.grouped else None
        system = SystemRanks("", "single", TargetRanks.concatenate(self._ranks), subset)
        summary = Summary(system, rules, [query.category for query in self.labelled])
        return {
            "queries": len(self.labelled),
            "hits": summary.total_hits()["hits"],
            "metrics": {name: round(summary.percent(name), 4) for name in summary.values},
        }


def _ranks(columns_BK: Ints, scores_BK: Scores, targets_BT: Ints) -> TargetRanks:
    """Ranks among some candidates of each query; targets that are not among them have none."""
    there = columns_BK >= 0
    known = np.unique(np.concatenate([columns_BK[there], targets_BT[targets_BT >= 0]]))
    scores_BN = np.full((len(columns_BK), len(known)), np.nan, np.float32)
    rows, places = np.nonzero(there)
    scores_BN[rows, np.searchsorted(known, columns_BK[there])] = scores_BK[rows, places]
    own_BT = np.where(targets_BT >= 0, np.searchsorted(known, targets_BT), -1)
    return rank_targets(scores_BN, own_BT)
