"""Convex weights: the static baseline that a learned fusion must beat.

Weights on the simplex for the sum of z-scores, searched by hill climbing from several starts. The
objective is the mean log2 rank of the target, which moves with every query, where a recall at one
K moves with few.
"""

from collections.abc import Callable, Iterator

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Floats, Ints, Scores, columns_of
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.static import Convex
from dafm_ray.tiles.store import TileStore

ABSENT = -1e6
"""Stands for the score of a masked candidate: last under all weights on the simplex."""

Cost = Callable[[Floats], float]

STEPS = (0.2, 0.1, 0.05, 0.02)
MEMORY_SCORES = 250_000_000
"""Scores held at most; a larger store is searched on the first queries, in hash order, that fit."""


def search_convex(*stores: TileStore) -> Convex:
    """Search weights on the queries of one store or of several with the same models.

    Raises:
        DataError: no query has a target.
    """
    models = stores[0].models
    room = MEMORY_SCORES // len(stores)
    normalised = [part for store in stores for part in _load(store, room)]
    if not normalised:
        uris = ", ".join(store.uri for store in stores)
        raise DataError(f"{uris}: no query has a target, so no weights can be searched")

    seen: dict[tuple[float, ...], float] = {}

    def cost(weights_M: Floats) -> float:
        key = tuple(np.round(weights_M, 6).tolist())
        if key not in seen:
            seen[key] = _mean_log_rank(normalised, np.array(key, dtype=np.float32))
        return seen[key]

    best = min((_climb(start, cost) for start in _starts(len(models))), key=lambda found: found[1])
    weights = {name: float(w) for name, w in zip(models, np.round(best[0], 4), strict=True)}
    return Convex(weights, " + ".join(store.manifest.title for store in stores))


def _load(store: TileStore, room: int) -> list[tuple[Scores, Ints]]:
    """(z-scores (M, B, N), target columns (B, T)) of queries with targets."""
    parts: list[tuple[Scores, Ints]] = []
    for chunk in masked_scores(store):
        queries = store.queries[chunk.rows.start : chunk.rows.stop]
        kept = [b for b, query in enumerate(queries) if query.targets]
        room -= chunk.scores_MBN.size
        if kept and room >= 0:
            targets_BT = columns_of([queries[b].targets for b in kept], store.positions)
            scores_MBN = chunk.scores_MBN[:, kept]
            absent_BN = np.isnan(scores_MBN).all(axis=0)
            filled_MBN = np.where(absent_BN, ABSENT, np.nan_to_num(zscore(scores_MBN)))
            parts.append((filled_MBN.astype(np.float32), targets_BT))
    return parts


def _mean_log_rank(parts: list[tuple[Scores, Ints]], weights_M: Scores) -> float:
    total, count = 0.0, 0
    for scores_MBN, targets_BT in parts:
        fused_BN = np.tensordot(weights_M, scores_MBN, axes=1)
        rows_B1 = np.arange(len(fused_BN))[:, None]
        target_BT = np.where(targets_BT >= 0, fused_BN[rows_B1, targets_BT], -np.inf)
        best_B1 = target_BT.max(axis=1, keepdims=True)
        ahead_B = (fused_BN > best_B1).sum(axis=1)
        tied_B = (fused_BN == best_B1).sum(axis=1) - (target_BT == best_B1).sum(axis=1)
        total += float(np.log2(1 + ahead_B + tied_B / 2).sum())
        count += len(fused_BN)
    return total / count


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
