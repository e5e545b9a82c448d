"""Query-bank normalisation: candidates that score high for every query are hubs, and lose for it.

    h_n = (1 / t) log mean_q e^(t z_qn),    z'_qn = z_qn - strength h_n

over the queries q of a bank, z the z-score of candidate n for q under one model. The bank needs no
labels, but it must not hold the query it is used for, nor one of its fold; so the sums are kept
fold by fold, and a fold's bank adds up the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dafm_ray.datasets.base import digest
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.folds import NOBODY, folds_of_rows
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.profiles import SIZE, Profiles, project
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.static import Convex
from dafm_ray.progress import progress
from dafm_ray.tiles.store import TileStore

SUFFIX = "+bank"
"""Ends the name of a system whose scores are normalised by a bank."""

NEEDS_ALL = "A query bank (`+bank`; in a fusion set bank_t: 0 and profiles: false)"
LARGEST_EXPONENT = 600.0
"""Of e^x that sums of many of them still fit into float64."""


@dataclass(frozen=True)
class Bank:
    """Sums over a bank's queries, fold by fold.

    Attributes:
        models: M names, in the store's order.
        t: of the formula above; the larger, the more a candidate's few best scores count.
        title: whose queries these are.
        fold_of_Q: fold of each query that the bank is used for, in stored order; `NOBODY` for one
            the bank does not hold.
        sums_FMN: float64, sum of e^(t z) over the queries of each fold.
        counts_FMN: float64, queries of each fold that scored the candidate.
        profiles: of the candidates, from the same queries; None if nobody asked for them.
        digest: of the queries, their folds, the gallery, the models and t.
    """

    models: tuple[str, ...]
    t: float
    title: str
    fold_of_Q: Ints
    sums_FMN: NDArray[np.float64]
    counts_FMN: NDArray[np.float64]
    profiles: Profiles | None
    digest: str
    _known: dict[tuple[int, ...], Scores] = field(default_factory=dict, repr=False)

    @property
    def note(self) -> str:
        """Whose queries these are, and how to find the statistics again."""
        own = (self.fold_of_Q != NOBODY).any()
        held = (
            "the queries of the store, less the own fold" if own else "none of the queries ranked"
        )
        return f"Query bank: {self.title}, {held}; t {self.t:g}, digest {self.digest[:12]}."

    def without(self, *folds: int) -> Scores:
        """(M, N) float32 hub statistics from all folds but some: for the queries of a fold that
        one, and in training also the fold that is held out.

        Sums are added, never subtracted: what a fold holds leaves no trace in another's bank.
        """
        left_out = tuple(sorted(set(folds) - {NOBODY}))
        if left_out not in self._known:
            others = [f for f in range(len(self.sums_FMN)) if f not in left_out]
            sums_MN = self.sums_FMN[others].sum(axis=0)
            counts_MN = self.counts_FMN[others].sum(axis=0)
            seen = counts_MN > 0
            mean_MN = np.divide(sums_MN, counts_MN, out=np.ones_like(sums_MN), where=seen)
            self._known[left_out] = (np.log(mean_MN) / self.t).astype(np.float32)
        return self._known[left_out]

    def folds(self, rows_B: Ints) -> Ints:
        """The fold of each query; `NOBODY` for one that the bank does not hold."""
        return folds_of_rows(self.fold_of_Q, rows_B)

    def hubs(self, rows_B: Ints, held_out: int = NOBODY) -> Scores:
        """(M, B, N) float32 hub statistics for some queries, each without its own fold.

        Args:
            rows_B: positions of the queries in their store; -1 for a query of no store.
            held_out: a further fold that is left out.
        """
        fold_of_B = self.folds(rows_B)
        shape = (self.sums_FMN.shape[1], len(rows_B), self.sums_FMN.shape[2])
        hubs_MBN = np.empty(shape, np.float32)
        for fold in np.unique(fold_of_B):
            hubs_MBN[:, fold_of_B == fold] = self.without(int(fold), held_out)[:, None]
        return hubs_MBN


def own_bank(store: TileStore, fold_of_Q: Ints, t: float, profiles: bool = False) -> Bank:
    """The bank of a store's own queries; kept in the store, and found there again.

    Args:
        store: complete tiles of its models.
        fold_of_Q: fold of each query, in stored order.
        t: of the formula.
        profiles: also collect the profiles of the candidates.

    Raises:
        ConfigError: t is not above 0, the folds are not those of the store's queries, or the store
            keeps shortlists.
        DataError: z-scores so large that e^(t z) overflows.
    """
    store.refuse_shortlist(NEEDS_ALL)
    if not 0 < t < math.inf:
        raise ConfigError("the t of a query bank must be a number above 0")
    if len(fold_of_Q) != store.manifest.queries_size:
        raise ConfigError(f"{len(fold_of_Q)} folds for {store.manifest.queries_size} queries")
    identity = _digest(store, t, fold_of_Q.tolist())
    if (kept := store.bank(identity)) is not None:
        sums_FMN, counts_FMN = kept[:, 0], kept[:, 1]
    else:
        sums_FMN, counts_FMN = _collect(store, fold_of_Q, t)
        store.keep_bank(identity, np.stack([sums_FMN, counts_FMN], axis=1))
    return Bank(
        store.models,
        t,
        store.manifest.title,
        fold_of_Q,
        sums_FMN,
        counts_FMN,
        _profiles(store, fold_of_Q) if profiles else None,
        identity,
    )


def _profiles(store: TileStore, fold_of_Q: Ints) -> Profiles:
    identity = _digest(store, SIZE, fold_of_Q.tolist())
    kept = store.bank(identity)
    if kept is None:
        made = project(store, fold_of_Q)
        store.keep_bank(identity, made)
        # Mapped from the store they take no memory of their own.
        kept = store.bank(identity)
        return Profiles(made if kept is None else kept)
    return Profiles(kept)


def bank_of_others(store: TileStore, source: TileStore, t: float, profiles: bool = False) -> Bank:
    """A bank of another store's queries over the same gallery, as a query log.

    Args:
        store: whose queries the bank is used for.
        source: holds the queries of the bank under the same models.
        t: of the formula.
        profiles: as in `own_bank`.

    Raises:
        DataError: another gallery, other models or weights, or queries of `store` itself.
    """
    if source.manifest.gallery_digest != store.manifest.gallery_digest:
        raise DataError(f"{source.uri} searches another gallery than {store.uri}; a bank cannot")
    shared = {query.id for query in store.queries} & {query.id for query in source.queries}
    if shared:
        raise DataError(
            f"{source.uri} holds queries of {store.uri} ({len(shared)} of them); a query must not "
            "be in its own bank"
        )
    known = source.manifest.models
    for name in store.models:
        if name not in known or not known[name].may_equal(store.manifest.models[name]):
            raise DataError(f"{source.uri} does not hold the model {name} of {store.uri}")
    unfolded = np.zeros(source.size("queries"), dtype=np.int64)
    bank = own_bank(source.of(store.models), unfolded, t, profiles)
    return replace(bank, fold_of_Q=np.full(store.size("queries"), NOBODY))


def _collect(
    store: TileStore, fold_of_Q: Ints, t: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts, a bounded number of scores at a time."""
    folds = int(fold_of_Q.max()) + 1
    shape = (folds, len(store.models), store.manifest.gallery_size)
    sums_FMN, counts_FMN = np.zeros(shape), np.zeros(shape)
    with progress("bank", store.size("queries"), unit="query") as shown:
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
            shown.advance(len(chunk.rows))
    return sums_FMN, counts_FMN


def _digest(store: TileStore, t: float, folds: Sequence[int]) -> str:
    manifest = store.manifest
    named = [f"{name} {' '.join(manifest.models[name].identity)}" for name in store.models]
    labels = [manifest.queries_digest, manifest.gallery_digest, *named, repr(t), repr(list(folds))]
    return digest(labels)


@dataclass(frozen=True)
class Banked:
    """Another system on z-scores from which the hub statistics are taken away."""

    system: Fusion
    bank: Bank
    strength: float
    suffix: str = SUFFIX

    @property
    def name(self) -> str:
        """The system's name and `+bank`, with the strength where that was asked for."""
        return self.system.name + self.suffix

    @property
    def kind(self) -> str:
        """As the system's."""
        return self.system.kind

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """The system's scores of z - strength h; convex weights take these as they are, another
        system normalises them as it always does.
        """
        corrected = zscore(scores_MBN) - np.float32(self.strength) * self.bank.hubs(rows_B)
        return self.system(corrected, rows_B)


def banked_convex(convex: Convex, bank: Bank, strength: float) -> Banked:
    """sum_m w_m (z_m - strength h_m)."""
    return Banked(replace(convex, normalisation="none"), bank, strength)
