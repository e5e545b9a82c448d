"""Hard negatives: mined from an index of the gallery, drawn for every step.

Shape letters: Q queries, T targets, X excluded candidates, G group members, W places of the window,
K candidates searched, B queries at a time, D feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dafm_ray.datasets.base import Query
from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.metrics import Ints, columns_of
from dafm_ray.finetune.config import MiningConfig
from dafm_ray.search.index import Floats, Index

Mask = NDArray[np.bool_]

QUERIES_AT_ONCE = 256

NEVER = "target, reference or excluded"
RULES = (NEVER, "near_duplicate", "same_group", "margin", "cap")
"""What takes a candidate out, in this order: each is counted under the first rule that does."""


@dataclass(frozen=True)
class Known:
    """What a data set says of each query, in columns of the index; -1 stands for nothing, and for
    an image that is not in the index.

    Attributes:
        targets_QT: all its targets.
        references_Q: its reference.
        excluded_QX: what its protocol excludes.
        groups_QG: its group.
    """

    targets_QT: Ints
    references_Q: Ints
    excluded_QX: Ints
    groups_QG: Ints

    @staticmethod
    def of(queries: Sequence[Query], ids: Sequence[str]) -> "Known":
        """Look queries up.

        Args:
            queries: of a data set.
            ids: of the index, in the order of its columns.
        """
        there = {id: n for n, id in enumerate(ids)}

        def columns(rows: Sequence[Sequence[str]]) -> Ints:
            return columns_of([[id for id in row if id in there] for row in rows], there)

        return Known(
            columns([query.targets for query in queries]),
            columns([(query.reference,) for query in queries])[:, 0],
            columns([query.excluded for query in queries]),
            columns([query.group for query in queries]),
        )

    def select(self, rows: slice | Ints) -> "Known":
        """Of some queries."""
        return Known(
            self.targets_QT[rows],
            self.references_Q[rows],
            self.excluded_QX[rows],
            self.groups_QG[rows],
        )

    @property
    def positives(self) -> Ints:
        """(Q, T + 1) targets and reference: what near-duplicates are of."""
        return np.concatenate([self.targets_QT, self.references_Q[:, None]], axis=1)

    @property
    def never(self) -> Ints:
        """(Q, T + 1 + X) what is never a negative."""
        return np.concatenate([self.positives, self.excluded_QX], axis=1)


@dataclass(frozen=True)
class Mined:
    """The negatives that each query may have, in the order of the window.

    Attributes:
        columns_QW: columns of the index, -1 behind the last.
        ranks_QW: their places among the candidates that may be negatives, from 1; 0 behind the
            last.
        scores_QW: their scores; NaN behind the last.
        removed: rule -> candidates it took out; of what is never a negative, those that stood
            before the window's end.
    """

    columns_QW: Ints
    ranks_QW: Ints
    scores_QW: Floats
    removed: Mapping[str, int]

    @property
    def without(self) -> Ints:
        """Positions of the queries that are left with no negative."""
        return np.flatnonzero((self.columns_QW < 0).all(axis=1))


def mine(
    features_QD: Floats,
    index: Index,
    known: Known,
    target_scores_Q: Floats,
    mining: MiningConfig,
) -> Mined:
    """Find the window of each query and apply the rules to it.

    Args:
        features_QD: whose nearest candidates are mined: of the queries, or of their positive images
            (`mining.near` is the caller's to follow).
        index: of the gallery, under the same weights.
        known: of the same queries.
        target_scores_Q: of each query's target for the same features, which `margin` compares with.
        mining: window and rules.

    Raises:
        ConfigError: the window ends behind the last candidate.
        DataError: features are no numbers or of another width.
    """
    first, last = mining.ranks
    never_Q = _distinct(known.never)
    fewest = len(index.ids) - int(never_Q.max(initial=0))
    if fewest < last:
        raise ConfigError(
            f"negatives.ranks ends at {last}, and a query has {fewest} candidates that may be "
            f"negatives in a gallery of {len(index.ids)}; lower it"
        )
    removed = dict.fromkeys(RULES, 0)
    shape = (len(features_QD), last - first + 1)
    columns_QW, ranks_QW = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    scores_QW = np.full(shape, np.nan, np.float32)
    for start in range(0, len(features_QD), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        here = known.select(part)
        k = last + int(never_Q[part].max())
        scores_BK, columns_BK = index.search(features_QD[part], k)
        never_BK = _among(columns_BK, here.never)
        ranks_BK = np.cumsum(~never_BK, axis=1)
        removed[NEVER] += int((never_BK & (ranks_BK < last)).sum())
        kept_BK = ~never_BK & (first <= ranks_BK) & (ranks_BK <= last)
        for rule in RULES[1:]:
            refused_BK = _refused(
                rule, columns_BK, scores_BK, here, target_scores_Q[part], index, mining
            )
            if refused_BK is not None:
                removed[rule] += int((kept_BK & refused_BK).sum())
                kept_BK &= ~refused_BK
        order_BW = np.argsort(~kept_BK, axis=1, kind="stable")[:, : shape[1]]
        kept_BW = np.take_along_axis(kept_BK, order_BW, axis=1)
        for found_QW, values_BK in (
            (columns_QW, columns_BK),
            (ranks_QW, ranks_BK),
            (scores_QW, scores_BK),
        ):
            found_QW[part][kept_BW] = np.take_along_axis(values_BK, order_BW, axis=1)[kept_BW]
    return Mined(columns_QW, ranks_QW, scores_QW, removed)


def _distinct(columns_QT: Ints) -> Ints:
    """(Q,) number of different columns of each row."""
    ordered_QT = np.sort(columns_QT, axis=1)
    new_QT = np.diff(ordered_QT, axis=1, prepend=-1) > 0
    counts: Ints = new_QT.sum(axis=1)
    return counts


def _among(columns_BK: Ints, others_BT: Ints) -> Mask:
    """(B, K) whether a column is one of its query's others."""
    found: Mask = (columns_BK[:, :, None] == others_BT[:, None, :]).any(axis=2)
    return found


def _refused(
    rule: str,
    columns_BK: Ints,
    scores_BK: Floats,
    known: Known,
    target_scores_B: Floats,
    index: Index,
    mining: MiningConfig,
) -> Mask | None:
    """(B, K) what a rule takes out; None if it is not asked for."""
    if rule == "near_duplicate" and mining.near_duplicate < 1:
        nearest_BK: Floats = _cosines(columns_BK, known.positives, index).max(axis=2)
        return nearest_BK > mining.near_duplicate
    if rule == "same_group" and mining.same_group == "drop":
        return _among(columns_BK, known.groups_QG)
    if rule == "margin" and mining.margin is not None:
        return scores_BK > target_scores_B[:, None] - mining.margin
    if rule == "cap" and mining.cap is not None:
        return scores_BK > mining.cap
    return None


def _cosines(columns_BK: Ints, others_BT: Ints, index: Index) -> Floats:
    """(B, K, T) cosines of the images of candidates and others; -inf where there is no other."""
    asked = np.unique(np.concatenate([columns_BK.ravel(), others_BT[others_BT >= 0]]))
    images_UD = index.images(asked)
    candidates_BKD = images_UD[np.searchsorted(asked, columns_BK)]
    others_BTD = images_UD[np.searchsorted(asked, others_BT)]
    cosines_BKT: Floats = candidates_BKD @ others_BTD.transpose(0, 2, 1)
    return np.where(others_BT[:, None, :] >= 0, cosines_BKT, -np.inf)


def draw(columns_QW: Ints, mining: MiningConfig, seed: int, epoch: int, queries_B: Ints) -> Ints:
    """The negatives of some queries in one epoch.

    A query's draw depends on the seed, the epoch and its position alone: batches and workers change
    nothing.

    Args:
        columns_QW: of `Mined`.
        mining: `count` and `sampling`.
        seed: of the training.
        epoch: from 0.
        queries_B: positions of the queries among those that were mined.

    Returns:
        (B, count) columns, all different in a row; -1 for what a query has too few of.
    """
    drawn_BC = columns_QW[queries_B, : mining.count].copy()
    if mining.sampling == "first":
        return drawn_BC
    for drawn_C, q in zip(drawn_BC, queries_B, strict=True):
        allowed = columns_QW[q][columns_QW[q] >= 0]
        order = np.random.default_rng((seed, epoch, int(q))).permutation(len(allowed))
        drawn_C[: len(allowed)] = allowed[order[: mining.count]]
    return drawn_BC
