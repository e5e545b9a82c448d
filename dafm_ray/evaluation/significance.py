"""Is a difference real? Paired comparisons on the same queries.

Queries that share a fold group (the same references, the same concept) are not independent: the
bootstrap draws whole groups, and the randomisation test flips the signs of whole groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dafm_ray.evaluation.metrics import Floats, Ints, stratified_mean

RESAMPLES = 2000
RANDOMISATIONS = 20_000
CHUNK = 2_000_000
"""Random numbers that are held at a time."""

SIGNIFICANT = 0.05
"""Level of the marks in tables, after Holm's correction."""


@dataclass(frozen=True)
class Paired:
    """One system against another on one metric.

    Attributes:
        win: queries on which this system has the higher value.
        tie: queries on which both have the same.
        loss: queries on which the other one has the higher value.
        diff: difference in percent points.
        ci95: its 95 % interval, from a bootstrap over fold groups.
        p: two-sided paired randomisation test over fold groups.
        p_holm: the same, corrected for all comparisons that were made together.
    """

    metric: str
    win: int
    tie: int
    loss: int
    diff: float
    ci95: tuple[float, float]
    p: float
    p_holm: float

    @property
    def is_significant(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.p_holm < SIGNIFICANT


class Resampling:
    """Draws of the queries' fold groups, the same for every system and metric.

    Columns (Q, C) hold a value a query, NaN where a query does not count. Means are those of
    `stratified_mean`: over strata of the mean over their queries.

    Args:
        groups: (Q,) fold group of each query; "" stands alone.
        strata_Q: number of each query's stratum; one stratum by default.
        seed: of the draws.
    """

    def __init__(self, groups: Sequence[str], strata_Q: Ints | None = None, seed: int = 0) -> None:
        labels = [group or f"\0{n}" for n, group in enumerate(groups)]
        _, group_of = np.unique(labels, return_inverse=True)
        self._count = int(group_of.max()) + 1
        self._by_group = np.argsort(group_of, kind="stable")
        self._starts = np.searchsorted(group_of[self._by_group], np.arange(self._count))
        self._strata_Q = np.zeros(len(labels), dtype=np.int64) if strata_Q is None else strata_Q
        self._seed = seed

    def mean(self, values_Q: Floats) -> float:
        """Of one column."""
        return stratified_mean(values_Q, self._strata_Q)

    def interval(self, values_Q: Floats) -> tuple[float, float]:
        """95 % interval of one column, in percent points."""
        return self.intervals(values_Q[:, None])[0]

    def intervals(self, values_QC: Floats) -> list[tuple[float, float]]:
        """95 % percentile interval of the mean of every column, in percent points."""
        parts = []
        for counted_QC in self._counted(values_QC):
            sums_GC = self._sums(np.where(counted_QC, values_QC, 0.0))
            parts.append((sums_GC, self._sums(counted_QC), counted_QC.any(axis=0)))
        strata_C = np.sum([there_C for _, _, there_C in parts], axis=0)
        means_RC = np.zeros((RESAMPLES, values_QC.shape[1]))
        rng = np.random.default_rng(self._seed)
        for rows in self._chunks(RESAMPLES):
            drawn = rng.integers(0, self._count, size=(rows.stop - rows.start, self._count))
            times_RG = np.stack([np.bincount(row, minlength=self._count) for row in drawn])
            for sums_GC, counts_GC, there_C in parts:
                counts_RC = times_RG @ counts_GC
                own_RC = times_RG @ sums_GC / np.where(counts_RC > 0, counts_RC, np.nan)
                means_RC[rows] += np.where(there_C, own_RC, 0.0) / strata_C
        bounds_2C = np.nanpercentile(100 * means_RC, [2.5, 97.5], axis=0)
        return [(round(float(low), 3), round(float(high), 3)) for low, high in bounds_2C.T]

    def p_values(self, differences_QC: Floats) -> Floats:
        """(C,) two-sided p-value of every column's mean: how often it is as far from 0 when the
        differences of each group change their signs by chance.
        """
        weighted_QC = np.zeros_like(differences_QC)
        strata = list(self._counted(differences_QC))
        strata_C = np.sum([counted_QC.any(axis=0) for counted_QC in strata], axis=0)
        for counted_QC in strata:
            share_C = strata_C * np.maximum(counted_QC.sum(axis=0), 1)
            weighted_QC += np.where(counted_QC, differences_QC, 0.0) / share_C
        sums_GC = self._sums(weighted_QC)
        # Sums in another order differ in their last digits, and equal ones must count.
        found_C = np.abs(sums_GC.sum(axis=0)) - 1e-12
        extreme_C = np.zeros(len(found_C), dtype=np.int64)
        rng = np.random.default_rng(self._seed)
        for rows in self._chunks(RANDOMISATIONS):
            shape = (rows.stop - rows.start, self._count)
            signs_RG = 2.0 * rng.integers(0, 2, size=shape, dtype=np.int8) - 1.0
            extreme_C += (np.abs(signs_RG @ sums_GC) >= found_C).sum(axis=0)
        p_C: Floats = (1 + extreme_C) / (1 + RANDOMISATIONS)
        return p_C

    def random_means(self, probabilities_Q: Floats) -> Floats:
        """(RANDOMISATIONS,) means of hits that are drawn for each query with its probability."""
        strata = np.unique(self._strata_Q)
        means_R = np.zeros(RANDOMISATIONS)
        rng = np.random.default_rng(self._seed)
        for stratum in strata:
            own_Q = probabilities_Q[self._strata_Q == stratum]
            # As many draws as there are different probabilities, not as there are queries.
            for probability, count in zip(*np.unique(own_Q, return_counts=True), strict=True):
                hits_R = rng.binomial(count, probability, size=RANDOMISATIONS)
                means_R += hits_R / (len(own_Q) * len(strata))
        return means_R

    def _counted(self, values_QC: Floats) -> Iterator[NDArray[np.bool_]]:
        """Stratum by stratum, which values count."""
        there_QC = ~np.isnan(values_QC)
        for stratum in np.unique(self._strata_Q):
            yield there_QC & (self._strata_Q == stratum)[:, None]

    def _sums(self, values_QC: NDArray[Any]) -> Floats:
        """(G, C) sums over the queries of each group."""
        sums_GC: Floats = np.add.reduceat(
            values_QC[self._by_group].astype(np.float64), self._starts, axis=0
        )
        return sums_GC

    def _chunks(self, count: int) -> Iterator[slice]:
        step = max(1, CHUNK // self._count)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))


def compare(
    pairs: Sequence[tuple[str, Floats, Floats]],
    resampling: Resampling,
    least_p: Floats | None = None,
) -> list[Paired]:
    """Compare systems query by query, with Holm's correction over all pairs.

    Args:
        pairs: metric, (Q,) values of one system and of the other.
        resampling: of the same queries.
        least_p: (pairs,) p-values of another test; the larger of the two counts.
    """
    if not pairs:
        return []
    differences_QC = np.stack([one - other for _, one, other in pairs], axis=1)
    p_C = resampling.p_values(differences_QC)
    if least_p is not None:
        p_C = np.maximum(p_C, least_p)
    return [
        Paired(
            metric=metric,
            win=int((difference_Q > 0).sum()),
            tie=int((difference_Q == 0).sum()),
            loss=int((difference_Q < 0).sum()),
            diff=round(100 * resampling.mean(difference_Q), 3),
            ci95=interval,
            p=float(p),
            p_holm=float(corrected),
        )
        for (metric, _, _), difference_Q, interval, p, corrected in zip(
            pairs,
            differences_QC.T,
            resampling.intervals(differences_QC),
            p_C,
            holm(p_C),
            strict=True,
        )
    ]


def holm(p_C: Floats) -> Floats:
    """(C,) p-values corrected for their number (Holm, Scand. J. Statist. 1979): the smallest times
    C, the next times C - 1, none below the one before it, at most 1.
    """
    order = np.argsort(p_C, kind="stable")
    scaled = p_C[order] * np.arange(len(p_C), 0, -1)
    corrected = np.empty_like(p_C)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected
