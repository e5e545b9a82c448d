"""Static fusions: what every learned fusion must beat. Names as in ranx.

Sources: CombSUM and CombMNZ (Fox and Shaw, TREC-2, 1994); RRF (Cormack et al., SIGIR 2009, k = 60);
Borda count (Aslam and Montague, SIGIR 2001). A model that did not score a candidate adds nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations

import numpy as np

from dafm_ray.errors import ConfigError, unknown
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.kept import Kept
from dafm_ray.fusion.normalise import NORMALISATIONS, Moments, ranks_of, shares_of

RRF_K = 60
MNZ_DEPTH = 100
"""CombMNZ counts the models that retrieve a candidate. A dense score matrix retrieves everything,
so a model is taken to retrieve its first 100, as a search engine would return them."""


@dataclass(frozen=True)
class Single:
    """One sub-model alone."""

    name: str
    index: int
    kind: str = "single"

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """The model's own scores."""
        own: Scores = scores_MBN[self.index]
        return own


@dataclass(frozen=True)
class Static:
    """A fixed rule after a normalisation.

    Attributes:
        moments: of the store that is ranked, if it keeps shortlists.
    """

    name: str
    normalisation: str
    combine: Callable[[Scores], Scores]
    kind: str = "static"
    moments: Moments | None = field(default=None, compare=False)

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """Normalise each model's scores per query, then combine over models."""
        moments = self.moments and self.moments.of(rows_B)
        normalised = NORMALISATIONS[self.normalisation](scores_MBN, moments)
        scored_BN = ~np.logical_and.reduce(np.isnan(scores_MBN), axis=0)
        if 2 * np.count_nonzero(scored_BN) > scored_BN.size:
            return np.where(scored_BN, self.combine(normalised), np.nan)
        # Rank lists: only what some list names is combined.
        kept = Kept.of(scored_BN)
        return kept.scatter(self.combine(np.stack([kept.gather(own_BN) for own_BN in normalised])))


@dataclass(frozen=True)
class Convex:
    """Weighted sum of z-scores, weights on the simplex.

    Attributes:
        weights: model -> weight, in the store's order.
        searched_on: which queries the weights come from.
        normalisation: `none` where the scores are z-scores already.
        moments: of the store that is ranked, if it keeps shortlists.
    """

    weights: dict[str, float]
    searched_on: str
    name: str = "convex@zscore"
    kind: str = "static"
    normalisation: str = "zscore"
    moments: Moments | None = field(default=None, compare=False)

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """sum_m w_m z_m; a missing score counts as the model's mean."""
        moments = self.moments and self.moments.of(rows_B)
        normalised = NORMALISATIONS[self.normalisation](scores_MBN, moments)
        weights_M = np.array(list(self.weights.values()), dtype=scores_MBN.dtype)
        fused = np.tensordot(weights_M, np.nan_to_num(normalised), axes=1)
        return np.where(np.isnan(scores_MBN).all(axis=0), np.nan, fused)


def mean(scores_MBN: Scores) -> Scores:
    """Mean over the models that scored a candidate."""
    count = (~np.isnan(scores_MBN)).sum(axis=0)
    average: Scores = combsum(scores_MBN) / np.maximum(count, 1).astype(scores_MBN.dtype)
    return average


def combsum(scores_MBN: Scores) -> Scores:
    """Sum over models."""
    total: Scores = np.nansum(scores_MBN, axis=0)
    return total


def combmnz(scores_MBN: Scores) -> Scores:
    """Sum times the number of models with the candidate among their first `MNZ_DEPTH`."""
    retrieved_BN = (ranks_of(scores_MBN) <= MNZ_DEPTH).sum(axis=0)
    product: Scores = combsum(scores_MBN) * np.maximum(retrieved_BN, 1).astype(scores_MBN.dtype)
    return product


def rrf(scores_MBN: Scores, k: float = RRF_K) -> Scores:
    """Reciprocal rank fusion: sum of 1 / (k + rank)."""
    return _exact_sum(1 / (k + ranks_of(scores_MBN).astype(np.float64)), decimals=16)


def borda(scores_MBN: Scores) -> Scores:
    """Borda count: 1 for a model's first candidate, 1 / N less for each further one.

    N is the number of candidates the model scored, so models that scored fewer count alike.
    """
    return _exact_sum(shares_of(ranks_of(scores_MBN).astype(np.float64)), decimals=13)


def _exact_sum(terms_MBN: Scores, decimals: int) -> Scores:
    """Sum over models without the last digits, where rounding would break ties between candidates
    whose terms have the same sum.
    """
    ascending_MBN = np.nan_to_num(terms_MBN)
    # Sorted by exchanges of whole matrices; np.sort takes longer for a few models.
    for a, b in combinations(ascending_MBN, 2):
        a[:], b[:] = np.minimum(a, b), np.maximum(a, b)
    total: Scores = np.round(ascending_MBN.sum(axis=0), decimals)
    return total


_RULES: dict[str, tuple[Callable[[Scores], Scores], str]] = {
    "mean": (mean, "zscore"),
    "combsum": (combsum, "minmax"),
    "combmnz": (combmnz, "minmax"),
    "rrf": (rrf, ""),
    "borda": (borda, ""),
}
"""Rule -> function and the normalisation it has if none is named; "" for rules on ranks."""


def static_fusion(name: str, k: float = RRF_K, moments: Moments | None = None) -> Fusion:
    """`RULE` or `RULE@NORMALISATION`, as `mean@zscore`, `combmnz@minmax`, `rrf`.

    Args:
        name: of the rule.
        k: of `rrf`.
        moments: of the store that is ranked, if it keeps shortlists.

    Raises:
        ConfigError: no such rule or normalisation, or a rule on ranks with one.
    """
    rule, at, normalisation = name.partition("@")
    if rule not in _RULES:
        raise ConfigError(unknown("fusion", rule, _RULES))
    combine, default = _RULES[rule]
    if not default:
        if at:
            raise ConfigError(f"{name!r}: {rule} works on ranks; it takes no normalisation")
        return Static(rule, "none", partial(rrf, k=k) if rule == "rrf" else combine)
    chosen = normalisation if at else default
    if chosen not in NORMALISATIONS:
        raise ConfigError(f"{name!r}: {unknown('normalisation', chosen, NORMALISATIONS)}")
    return Static(f"{rule}@{chosen}", chosen, combine, moments=moments)
