"""Query-bank normalisation: candidates that score high for every query are hubs, and lose for it.

    h_n = (1 / t) log mean_q e^(t z_qn)

over the queries q of a bank, z the z-score of candidate n for q. The bank needs no labels, but it
must not hold the query it is used for, nor one of its fold; so the sums are kept fold by fold, and
a fold's bank adds up the others.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dafm_ray.datasets.base import digest
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.tiles.store import TileStore

LARGEST_EXPONENT = 600.0
"""Of e^x that sums of many of them still fit into float64."""


@dataclass(frozen=True)
class Bank:
    """Sums over a bank's queries, fold by fold.

    Attributes:
        models: M names, in the store's order.
        t: of the formula above.
        sums_FMN: float64, sum of e^(t z) over the queries of each fold.
        counts_FMN: int64, queries of each fold that scored the candidate.
        digest: of the queries, the gallery, the models and t.
    """

    models: tuple[str, ...]
    t: float
    sums_FMN: NDArray[np.float64]
    counts_FMN: Ints
    digest: str

    def without(self, *folds: int) -> Scores:
        """(M, N) float32 hub statistics from all folds but some: for the queries of a fold that
        one, and in training also the fold that is held out.

        Sums are added, never subtracted: what a fold holds leaves no trace in another's bank.
        """
        others = [f for f in range(len(self.sums_FMN)) if f not in folds]
        sums_MN = self.sums_FMN[others].sum(axis=0)
        counts_MN = self.counts_FMN[others].sum(axis=0)
        seen = counts_MN > 0
        mean_MN = np.divide(sums_MN, counts_MN, out=np.ones_like(sums_MN), where=seen)
        statistics: Scores = (np.log(mean_MN) / self.t).astype(np.float32)
        return statistics


def collect(store: TileStore, fold_of_Q: Ints, t: float = 1.0) -> Bank:
    """Add up a store's queries, a bounded number of scores at a time.

    Args:
        store: complete tiles of all its models.
        fold_of_Q: fold of each query, in stored order.
        t: the larger, the more a candidate's few best scores count.

    Raises:
        ConfigError: t is not above 0, or the folds are not those of the store's queries.
        DataError: z-scores so large that e^(t z) overflows.
    """
    if t <= 0:
        raise ConfigError("the t of a query bank must be above 0")
    if len(fold_of_Q) != store.manifest.queries_size:
        raise ConfigError(f"{len(fold_of_Q)} folds for {store.manifest.queries_size} queries")
    folds = int(fold_of_Q.max()) + 1
    shape = (folds, len(store.models), store.manifest.gallery_size)
    sums_FMN = np.zeros(shape)
    counts_FMN = np.zeros(shape, dtype=np.int64)
    for chunk in masked_scores(store):
        z_MBN = t * zscore(chunk.scores_MBN).astype(np.float64)
        if np.nanmax(z_MBN, initial=0.0) > LARGEST_EXPONENT:
            raise DataError(f"{store.uri}: z-scores too large for a query bank with t {t:g}")
        present_MBN = ~np.isnan(z_MBN)
        powers_MBN = np.where(present_MBN, np.exp(z_MBN), 0.0)
        fold_of_B = fold_of_Q[chunk.rows.start : chunk.rows.stop]
        for fold in np.unique(fold_of_B):
            sums_FMN[fold] += powers_MBN[:, fold_of_B == fold].sum(axis=1)
            counts_FMN[fold] += present_MBN[:, fold_of_B == fold].sum(axis=1)
    manifest = store.manifest
    identities = [" ".join(manifest.models[name].identity) for name in store.models]
    named = [manifest.queries_digest, manifest.gallery_digest, *identities, repr(t)]
    return Bank(store.models, t, sums_FMN, counts_FMN, digest(named))
