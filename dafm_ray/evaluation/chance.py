"""What a random order of every query's candidates hits, and how surely a system differs from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.metrics import Floats, Ints, random_hits
from dafm_ray.evaluation.significance import RANDOMISATIONS, Resampling


@dataclass(frozen=True)
class RandomOrder:
    """A uniformly random order of the candidates of each query.

    Attributes:
        candidates: (Q,) those that are ranked: the gallery without what is excluded.
        targets: (Q,) targets among them.
    """

    candidates: Ints
    targets: Ints

    @staticmethod
    def of(queries: Sequence[Query], sizes: Sequence[int]) -> "RandomOrder":
        """The candidates of queries, each over a gallery of so many images."""
        excluded = [set(query.excluded) for query in queries]
        targets = [len(set(q.targets) - gone) for q, gone in zip(queries, excluded, strict=True)]
        ranked = [size - len(gone) for size, gone in zip(sizes, excluded, strict=True)]
        return RandomOrder(np.array(ranked), np.array(targets))

    def hits(self, k: int) -> Floats:
        """(Q,) probability that one of the first K candidates is a target."""
        return random_hits(self.candidates, self.targets, k)


def chance_p_values(hits_QC: Floats, expected_Q: Floats, resampling: Resampling) -> Floats:
    """(C,) how often random orders, drawn anew for every query, hit as much more or less than
    expected as each column does.

    Where few hits are expected, the differences of the queries are too skewed for a randomisation
    of their signs: no hit at all would be significantly below chance, however few were due.

    Args:
        hits_QC: 1 for a hit, 0 for a miss.
        expected_Q: probability of a hit under a random order.
        resampling: of the queries.
    """
    drawn_R = resampling.random_means(expected_Q) - resampling.mean(expected_Q)
    found_C = np.array([abs(resampling.mean(hits_Q - expected_Q)) for hits_Q in hits_QC.T])
    # Sums in another order differ in their last digits, and equal ones must count.
    extreme_C = (np.abs(drawn_R)[:, None] >= found_C - 1e-12).sum(axis=0)
    p_C: Floats = (1 + extreme_C) / (1 + RANDOMISATIONS)
    return p_C
