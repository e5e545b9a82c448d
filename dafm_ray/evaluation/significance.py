"""Is a difference real? Paired comparisons on the same queries.

Queries that share a fold group (the same references, the same concept) are not independent, so
the bootstrap draws whole groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dafm_ray.evaluation.metrics import Floats, Ints, stratified_mean

RESAMPLES = 2000
RANDOMISATIONS = 100_000


@dataclass(frozen=True)
class Paired:
    """One system against another on one metric.

    Attributes:
        win: queries only this system hits.
        tie: queries both or neither hit.
        loss: queries only the other one hits.
        diff: difference in percent points.
        ci95: its 95 % interval, from a bootstrap over fold groups.
        p: two-sided paired randomisation test.
    """

    metric: str
    win: int
    tie: int
    loss: int
    diff: float
    ci95: tuple[float, float]
    p: float


class Bootstrap:
    """Resamples of the queries' fold groups, the same for every system and metric.

    Args:
        groups: (Q,) fold group of each query; "" stands alone.
        seed: of the resampling.
    """

    def __init__(self, groups: Sequence[str], seed: int = 0) -> None:
        labels = [group or f"\0{n}" for n, group in enumerate(groups)]
        _, self._group_of = np.unique(labels, return_inverse=True)
        count = int(self._group_of.max()) + 1
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, count, size=(RESAMPLES, count))
        self._draws = np.stack([np.bincount(row, minlength=count) for row in drawn])

    def interval(self, values_Q: Floats, strata_Q: Ints | None = None) -> tuple[float, float]:
        """95 % percentile interval of `stratified_mean`, in percent points.

        Args:
            values_Q: per query; NaN where a query does not count.
            strata_Q: as in `stratified_mean`; one stratum by default.
        """
        strata = np.zeros(len(values_Q), dtype=np.int64) if strata_Q is None else strata_Q
        means = []
        for stratum in np.unique(strata[~np.isnan(values_Q)]):
            counted = (strata == stratum) & ~np.isnan(values_Q)
            sums_G = self._by_group(np.where(counted, values_Q, 0.0))
            draws = self._draws @ np.stack([sums_G, self._by_group(counted)], axis=1)
            means.append(draws[:, 0] / np.where(draws[:, 1] > 0, draws[:, 1], np.nan))
        low, high = np.nanpercentile(100 * np.mean(means, axis=0), [2.5, 97.5])
        return round(float(low), 3), round(float(high), 3)

    def _by_group(self, values_Q: Floats) -> Floats:
        groups = self._draws.shape[1]
        return np.bincount(self._group_of, weights=values_Q, minlength=groups).astype(np.float64)


def compare(
    hits_Q: Ints, other_Q: Ints, metric: str, bootstrap: Bootstrap, strata_Q: Ints | None = None
) -> Paired:
    """Compare two systems' hits query by query; strata as in `Bootstrap.interval`."""
    difference_Q = (hits_Q - other_Q).astype(np.float64)
    win, loss = int((difference_Q > 0).sum()), int((difference_Q < 0).sum())
    return Paired(
        metric=metric,
        win=win,
        tie=len(hits_Q) - win - loss,
        loss=loss,
        diff=round(100 * stratified_mean(difference_Q, strata_Q), 3),
        ci95=bootstrap.interval(difference_Q, strata_Q),
        p=_randomisation(win, loss),
    )


def _randomisation(win: int, loss: int) -> float:
    """Signs of the differences flipped at random: wins are then Binomial(win + loss, 1/2)."""
    flipped = np.random.default_rng(0).binomial(win + loss, 0.5, size=RANDOMISATIONS)
    extreme = np.abs(2 * flipped - (win + loss)) >= abs(win - loss)
    return float((1 + extreme.sum()) / (1 + RANDOMISATIONS))
