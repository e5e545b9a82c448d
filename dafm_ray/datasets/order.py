"""Does the order of a data set's files leak the targets?

The baseline sees no pixel and no word: it ranks candidates by their distance to the reference in
the order of the source, forward before backward at equal distance, the reference left out. Where
it finds targets more often than under random orders, any ranker that profits from positions (a
stable sort over ties, a filter along the gallery axis) profits from the leak.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dafm_ray.datasets.base import Query

Ints = NDArray[np.int64]

PERMUTATIONS = 999
CUTOFFS = (1, 5, 10, 50)
JUDGED = 10
"""K of the recall the p-value is about."""


@dataclass(frozen=True)
class OrderLeak:
    """What positions alone find.

    Attributes:
        queries: with targets.
        hits: K -> queries with a target among the first K.
        chance: mean hits at `JUDGED` under random orders.
        p: one-sided permutation test of hits at `JUDGED`.
    """

    queries: int
    hits: dict[int, int]
    chance: float
    p: float


def order_leak(ids: Sequence[str], queries: Sequence[Query], seed: int = 0) -> OrderLeak | None:
    """Measure what an order gives away; None if no query has a target in the gallery.

    Args:
        ids: the gallery in that order.
        queries: with their targets.
        seed: of the random orders.
    """
    position = {id: n for n, id in enumerate(ids)}
    pairs = [
        (q, position[query.reference], position[target])
        for q, query in enumerate(queries)
        if query.reference in position
        for target in query.targets
        if target in position and target != query.reference
    ]
    if not pairs:
        return None
    query_P, reference_P, target_P = np.array(pairs, dtype=np.int64).T
    starts = np.flatnonzero(np.diff(query_P, prepend=-1))
    size = len(ids)

    def best_ranks(place: Ints) -> Ints:
        ranks = position_ranks(place[reference_P], place[target_P], size)
        best: Ints = np.minimum.reduceat(ranks, starts)
        return best

    found = best_ranks(np.arange(size))
    rng = np.random.default_rng(seed)
    shuffled = [
        int((best_ranks(rng.permutation(size)) <= JUDGED).sum()) for _ in range(PERMUTATIONS)
    ]
    hits = {k: int((found <= k).sum()) for k in CUTOFFS}
    as_good = sum(count >= hits[JUDGED] for count in shuffled)
    return OrderLeak(
        len(starts), hits, float(np.mean(shuffled)), (1 + as_good) / (1 + PERMUTATIONS)
    )


def position_ranks(reference: Ints, target: Ints, size: int) -> Ints:
    """1-based rank of the target by distance to the reference, in a list of `size`.

    Args:
        reference: (P,) positions.
        target: (P,) positions, none equal to its reference.
        size: of the list.
    """
    distance = np.abs(target - reference)
    after, before = size - 1 - reference, reference
    backward = (target < reference).astype(np.int64)
    nearer = np.minimum(distance - 1 + backward, after) + np.minimum(distance - 1, before)
    ranks: Ints = nearer + 1
    return ranks
