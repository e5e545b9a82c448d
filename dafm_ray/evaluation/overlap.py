"""Do systems hit the same queries? What one hits and another misses is what a fusion can gain."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dafm_ray.evaluation.metrics import Ints


@dataclass(frozen=True)
class Overlap:
    """Queries hit by the systems of a set, pair by pair.

    Attributes:
        metric: which hits, as `R@10`.
        hits: system -> queries it hits.
        gained: system -> other system -> queries the first hits and the other misses.
        jaccard: the same pairs -> hits of both / hits of either; 1 if neither hits any.
        any: queries at least one system hits.
    """

    metric: str
    hits: dict[str, int]
    gained: dict[str, dict[str, int]]
    jaccard: dict[str, dict[str, float]]
    any: int


def overlap(metric: str, hits_Q: Mapping[str, Ints]) -> Overlap:
    """Compare every pair.

    Args:
        metric: name of the column.
        hits_Q: system -> (Q,) 1 for a hit, else 0.
    """
    hit = {name: values > 0 for name, values in hits_Q.items()}
    pairs = {name: [other for other in hit if other != name] for name in hit}
    return Overlap(
        metric=metric,
        hits={name: int(values.sum()) for name, values in hit.items()},
        gained={
            name: {other: int((hit[name] & ~hit[other]).sum()) for other in others}
            for name, others in pairs.items()
        },
        jaccard={
            name: {other: _jaccard(hit[name], hit[other]) for other in others}
            for name, others in pairs.items()
        },
        any=int(np.any(list(hit.values()), axis=0).sum()),
    )


def _jaccard(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    either = int((one | other).sum())
    return round(float((one & other).sum() / either), 4) if either else 1.0
