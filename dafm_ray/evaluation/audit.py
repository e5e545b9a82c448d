"""What may make a number say more than it does: ties, twins, single modalities, seen queries."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, hypot, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.metrics import Floats, Ints, TargetRanks
from dafm_ray.evaluation.significance import Resampling

FIRST = 0.01
"""A target is found where it stands in this share of the gallery, whatever the gallery's size."""


Z95 = 1.96
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Ties:
    """What the order of equal scores decides for one system.

    Attributes:
        tied: queries whose best target shares its score with a candidate that is none.
        undecided: of these, queries that are a hit or a miss by that order alone.
        hits: at K, in stored order; `worst` and `best` if every tie fell against or for the target.
        expected: under a random order.
    """

    tied: int
    undecided: int
    hits: int
    worst: int
    best: int
    expected: float


def ties(ranks: TargetRanks, k: int) -> Ties:
    """Count what ties decide at K."""
    best_Q, worst_Q = ranks.best <= k, ranks.worst <= k
    return Ties(
        tied=int((ranks.tied_others > 0).sum()),
        undecided=int((best_Q & ~worst_Q).sum()),
        hits=int((ranks.stored <= k).sum()),
        worst=int(worst_Q.sum()),
        best=int(best_Q.sum()),
        expected=round(float(ranks.expected_hits(k).sum()), 2),
    )


@dataclass(frozen=True)
class Solved:
    """Queries that one modality alone solves.

    Attributes:
        queries: all of them.
        image: hit by the image alone; None if no such system ranked.
        text: hit by the text alone; None likewise.
        either: hit by one of the two.
        composed: hit by the composed system.
        composed_rest: of the queries that neither solves, hit by the composed system.
    """

    queries: int
    image: int | None
    text: int | None
    either: int
    composed: int
    composed_rest: int


def solved(composed_Q: Ints, image_Q: Ints | None, text_Q: Ints | None) -> Solved:
    """Count hits (1) and misses (0) of a composed system and of single modalities."""
    either_Q = np.zeros(len(composed_Q), dtype=bool)
    for alone_Q in (image_Q, text_Q):
        if alone_Q is not None:
            either_Q |= alone_Q > 0
    return Solved(
        queries=len(composed_Q),
        image=None if image_Q is None else int(image_Q.sum()),
        text=None if text_Q is None else int(text_Q.sum()),
        either=int(either_Q.sum()),
        composed=int(composed_Q.sum()),
        composed_rest=int(composed_Q[~either_Q].sum()),
    )


@dataclass(frozen=True)
class Shift:
    """How much better a model is on one set of queries than on another.

    Attributes:
        here: percent of the queries whose target stands in the first `FIRST` of the ranking.
        there: the same of the other queries.
        diff: points.
        ci95: its 95 % interval; the two sets are independent.
        p: two-sided, of the difference over its standard error.
    """

    here: float
    there: float
    diff: float
    ci95: tuple[float, float]
    p: float


def shift(
    here: TargetRanks, there: TargetRanks, sizes: tuple[int, int], groups: tuple[Sequence[str], ...]
) -> Shift:
    """Compare a model's ranks on two sets of queries, whatever the size of their galleries.

    Args:
        here: ranks of the one.
        there: ranks of the other.
        sizes: candidates of each gallery.
        groups: fold group of each query, of both.
    """
    shares, halves = [], []
    for ranks, size, own in zip((here, there), sizes, groups, strict=True):
        found_Q: Floats = (ranks.stored <= max(1, round(FIRST * size))).astype(np.float64)
        low, high = Resampling(own).interval(found_Q)
        shares.append(100 * float(found_Q.mean()))
        halves.append((high - low) / 2)
    diff, half = shares[0] - shares[1], hypot(*halves)
    ci95 = round(diff - half, 2), round(diff + half, 2)
    p = erfc(abs(diff) / half * Z95 / sqrt(2)) if half else float(diff == 0)
    return Shift(round(shares[0], 2), round(shares[1], 2), round(diff, 2), ci95, p)


class Fingerprints:
    """Candidates that no model tells apart: those with the same scores, bit for bit, everywhere.

    Args:
        candidates: N.
        seed: of the multipliers; two different columns are taken for one with a chance of 2^-63.
    """

    def __init__(self, candidates: int, seed: int = 0) -> None:
        self._sums_N = np.zeros(candidates, dtype=np.uint64)
        self._rng = np.random.default_rng(seed)

    def add(self, scores_BN: NDArray[np.floating[Any]]) -> None:
        """Take some rows of one model's scores in, in any but always the same order."""
        bits_BN = scores_BN.view(f"u{scores_BN.itemsize}").astype(np.uint64)
        factors_B1 = self._rng.integers(0, 2**63, size=(len(bits_BN), 1), dtype=np.uint64)
        self._sums_N += (bits_BN * (2 * factors_B1 + 1)).sum(axis=0, dtype=np.uint64)

    def groups(self) -> list[Ints]:
        """Positions of the candidates of every group of two or more, in stored order."""
        _, group_of, sizes = np.unique(self._sums_N, return_inverse=True, return_counts=True)
        members: defaultdict[int, list[int]] = defaultdict(list)
        for n in np.flatnonzero(sizes[group_of] > 1).tolist():
            members[int(group_of[n])].append(n)
        return sorted((np.array(own) for own in members.values()), key=lambda own: int(own[0]))


def asked_twice(queries: Sequence[Query]) -> list[list[int]]:
    """Queries with the same reference and, but for case and spaces, the same text."""
    asked: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for q, query in enumerate(queries):
        words = (" ".join(caption.lower().split()) for caption in query.captions)
        asked[(query.reference, *words)].append(q)
    return [same for same in asked.values() if len(same) > 1]
