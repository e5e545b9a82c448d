"""Convex weights: the static baseline that a learned fusion must beat.

Weights on the simplex for the sum of z-scores, searched by hill climbing from several starts. The
objective is the mean log2 rank of the target, which moves with every query, where a recall at one
K moves with few. Weights for a fold's queries are searched on the others.

A candidate below the target under every model is below it under all weights; only the others are
kept, which makes a search cheap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Floats, Ints, Scores
from dafm_ray.fusion.bank import Bank
from dafm_ray.fusion.candidates import columns_in, moments_of
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.normalise import Moments, zscore
from dafm_ray.fusion.rank import Chunk, masked_scores
from dafm_ray.fusion.static import Convex
from dafm_ray.tiles.store import TileStore

Cost = Callable[[Floats], float]

STEPS = (0.2, 0.1, 0.05, 0.02)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of a query bank, searched once the weights are found."""

MEMORY_SCORES = 20_000_000
"""Differences held at most; of a larger store the first queries, in hash order, are searched."""


def search_convex(*stores: TileStore) -> Convex:
    """Search weights on the queries of one store or of several with the same models.

    Raises:
        DataError: no query has a target.
    """
    unfolded = [np.zeros(store.size("queries"), dtype=np.int64) for store in stores]
    return search_folds(stores, unfolded, [NOBODY])[0]


def search_folds(
    stores: Sequence[TileStore], fold_of_Qs: Sequence[Ints], held_out: Sequence[int]
) -> list[Convex]:
    """Search weights once for each fold that is held out, on the queries of the others.

    Args:
        stores: with the same models.
        fold_of_Qs: fold of each query, store by store.
        held_out: folds; `NOBODY` searches on all queries.

    Raises:
        DataError: no query has a target.
    """
    ahead = _load(stores, fold_of_Qs)
    title = " + ".join(store.manifest.title for store in stores)
    uris = ", ".join(store.uri for store in stores)
    models = stores[0].models
    found = []
    for fold in held_out:
        learning_Q = np.flatnonzero(ahead.fold_of_Q != fold)
        if not len(learning_Q):
            raise DataError(f"{uris}: no query has a target, so no weights can be searched")

        def cost(weights_M: Floats, learning_Q: Ints = learning_Q) -> float:
            return float(ahead.log_ranks(weights_M)[learning_Q].mean())

        starts = _starts(len(models))
        best, _ = min((_climb(start, cost) for start in starts), key=lambda result: result[1])
        weights = {name: float(w) for name, w in zip(models, np.round(best, 4), strict=True)}
        found.append(Convex(weights, title))
    return found


class _Ahead:
    """Candidates that are not below the target under every model, by their lead over it.

    Args:
        leads_MP: float32, z-score of a candidate less the target's.
        sizes_S: int64, how many of P belong to each (query, target).
        targets_Q: int64, how many of S belong to each query.
        fold_of_Q: of each query.
    """

    def __init__(self, leads_MP: Scores, sizes_S: Ints, targets_Q: Ints, fold_of_Q: Ints) -> None:
        self.leads_MP = leads_MP
        self.fold_of_Q = fold_of_Q
        self._sizes_S = sizes_S
        self._starts_S = np.cumsum(sizes_S) - sizes_S
        self._first_Q = np.cumsum(targets_Q) - targets_Q
        self._known: dict[tuple[float, ...], Floats] = {}

    def log_ranks(self, weights_M: Floats) -> Floats:
        """(Q,) log2 rank of the best target, ties counted half."""
        key = tuple(np.round(weights_M, 6).tolist())
        if key not in self._known:
            leads_P = np.array(key, dtype=np.float32) @ self.leads_MP
            # Twice the candidates ahead: 2 for one that leads, 1 for one that ties.
            doubled_P = (leads_P > 0).view(np.int8) + (leads_P >= 0).view(np.int8)
            ranks_S = np.ones(len(self._sizes_S))
            filled_S = np.flatnonzero(self._sizes_S)
            sums = np.add.reduceat(doubled_P, self._starts_S[filled_S], dtype=np.int64)
            ranks_S[filled_S] += sums / 2
            self._known[key] = np.log2(np.minimum.reduceat(ranks_S, self._first_Q))
        return self._known[key]


def _load(stores: Sequence[TileStore], fold_of_Qs: Sequence[Ints]) -> _Ahead:
    leads: list[Scores] = []
    sizes: list[int] = []
    targets: list[int] = []
    folds: list[int] = []
    for store, fold_of_Q in zip(stores, fold_of_Qs, strict=True):
        room = MEMORY_SCORES // len(stores)
        for labelled in _labelled(store):
            z_MBN = labelled.z_MBN
            for b, columns_T in enumerate(labelled.targets_BT):
                if room < 0:
                    break
                own = columns_T[columns_T >= 0]
                others_N = ~labelled.absent_BN[b]
                others_N[own] = False
                for column in own:
                    leads_MN = z_MBN[:, b] - z_MBN[:, b, column, None]
                    kept_N = others_N & (leads_MN >= 0).any(axis=0)
                    leads.append(leads_MN[:, kept_N])
                    sizes.append(int(kept_N.sum()))
                    room -= leads[-1].size
                targets.append(len(own))
                folds.append(int(fold_of_Q[labelled.rows_B[b]]))
    models = len(stores[0].models)
    return _Ahead(
        np.concatenate([np.empty((models, 0), np.float32), *leads], axis=1),
        np.array(sizes, dtype=np.int64),
        np.array(targets, dtype=np.int64),
        np.array(folds, dtype=np.int64),
    )


@dataclass(frozen=True)
class _Labelled:
    """Queries with targets: z-scores, where a model has none, what is absent, columns of the
    targets.
    """

    rows_B: Ints
    z_MBN: Scores
    missing_MBN: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    absent_BN: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    targets_BT: Ints


def _labelled(store: TileStore) -> Iterator[_Labelled]:
    """All queries whose target was scored, a bounded number of scores at a time."""
    moments = moments_of(store)
    for chunk in masked_scores(store):
        part = _labelled_part(store, chunk, moments)
        if len(part.rows_B):
            yield part


def _labelled_part(store: TileStore, chunk: Chunk, moments: Moments | None) -> _Labelled:
    absent_BN = np.asarray(np.isnan(chunk.scores_MBN).all(axis=0))
    queries = store.queries[chunk.rows.start : chunk.rows.stop]
    targets_BT = columns_in(store, chunk.rows, [query.targets for query in queries])
    rows_B1 = np.arange(len(queries))[:, None]
    targets_BT = np.where(absent_BN[rows_B1, targets_BT], -1, targets_BT)
    kept = np.flatnonzero((targets_BT >= 0).any(axis=1))
    rows_B = np.array(chunk.rows)[kept]
    z_MBN = zscore(chunk.scores_MBN[:, kept], moments and moments.of(rows_B))
    missing_MBN = np.asarray(np.isnan(z_MBN))
    z_MBN[missing_MBN] = 0
    return _Labelled(rows_B, z_MBN, missing_MBN, absent_BN[kept], targets_BT[kept])


def search_strengths(
    stores: Sequence[TileStore],
    banks: Sequence[Bank],
    convexes: Sequence[Convex],
    held_out: Sequence[int],
) -> list[float]:
    """The strength of a query bank for each of the weights of `search_folds`, searched on the same
    queries.

    Args:
        stores: as there.
        banks: of each store.
        convexes: weights for each fold that is held out.
        held_out: the folds.
    """
    costs = np.zeros((len(held_out), len(STRENGTHS)))
    for store, bank in zip(stores, banks, strict=True):
        for labelled in _labelled(store):
            fold_of_B = bank.fold_of_Q[labelled.rows_B]
            for f, (convex, fold) in enumerate(zip(convexes, held_out, strict=True)):
                learning = np.flatnonzero(fold_of_B != fold)
                weights_M = np.array(list(convex.weights.values()), np.float32)
                hubs_MBN = bank.hubs(labelled.rows_B[learning], fold)
                hubs_MBN[labelled.missing_MBN[:, learning]] = 0
                fused_BN = np.tensordot(weights_M, labelled.z_MBN[:, learning], axes=1)
                fused_BN[labelled.absent_BN[learning]] = -np.inf
                hub_BN = np.tensordot(weights_M, hubs_MBN, axes=1)
                for s, strength in enumerate(STRENGTHS):
                    scores_BN = fused_BN - np.float32(strength) * hub_BN
                    costs[f, s] += _log_ranks(scores_BN, labelled.targets_BT[learning]).sum()
    return [STRENGTHS[s] for s in costs.argmin(axis=1)]


def _log_ranks(fused_BN: Scores, targets_BT: Ints) -> Floats:
    """(B,) log2 rank of the best target, ties counted half."""
    rows_B1 = np.arange(len(fused_BN))[:, None]
    target_BT = np.where(targets_BT >= 0, fused_BN[rows_B1, targets_BT], -np.inf)
    best_B1 = target_BT.max(axis=1, keepdims=True)
    ahead_B = (fused_BN > best_B1).sum(axis=1)
    tied_B = (fused_BN == best_B1).sum(axis=1) - (target_BT == best_B1).sum(axis=1)
    log_ranks: Floats = np.log2(1 + ahead_B + tied_B / 2)
    return log_ranks


def _starts(models: int) -> Iterator[Floats]:
    """Equal weights, and each model in turn with most of the weight."""
    uniform = np.full(models, 1 / models)
    yield uniform
    for favoured in range(models):
        yield 0.6 * np.eye(models)[favoured] + 0.4 * uniform


def _climb(start: Floats, cost: Cost) -> tuple[Floats, float]:
    """Move weight between two models while that lowers the cost, in ever smaller steps."""
    here, value = start, cost(start)
    for step in STEPS:
        improved = True
        while improved:
            neighbours = [(there, cost(there)) for there in _moves(here, step)]
            there, lowest = min(neighbours, key=lambda found: found[1], default=(here, value))
            improved = lowest < value
            if improved:
                here, value = there, lowest
    return here, value


def _moves(weights_M: Floats, step: float) -> Iterator[Floats]:
    for giver in range(len(weights_M)):
        given = min(step, weights_M[giver])
        for taker in range(len(weights_M)):
            if giver != taker and given > 0:
                moved = weights_M.copy()
                moved[giver] -= given
                moved[taker] += given
                yield moved
