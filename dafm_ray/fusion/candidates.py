"""Which candidate stands in which column of a query's scores.

A store of all scores has the gallery in its columns. Where only shortlists are kept every query
has its own candidates: columns are found query by query, a candidate that is not listed has the
last one, which holds no score, and normalisations take the moments of the whole gallery.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dafm_ray.evaluation.metrics import Ints, columns_of
from dafm_ray.fusion.normalise import Moments
from dafm_ray.tiles.store import TileStore


def columns_in(
    store: TileStore, rows_B: Sequence[int] | Ints, ids: Sequence[Sequence[str]]
) -> Ints:
    """(B, longest) columns of gallery ids in the scores of some queries, -1 where a row is shorter.

    Args:
        store: whose scores.
        rows_B: positions of the queries.
        ids: of each query.
    """
    positions_BT = columns_of(ids, store.positions)
    if not store.manifest.shortlist:
        return positions_BT
    columns_BT = np.full_like(positions_BT, -1)
    for b, listed_W in enumerate(_listed(store, rows_B)):
        positions_T, kept_W = positions_BT[b], listed_W[listed_W >= 0]
        places_T = np.searchsorted(kept_W, positions_T)
        columns_T = np.where(np.isin(positions_T, kept_W), places_T, len(listed_W) - 1)
        columns_BT[b] = np.where(positions_T >= 0, columns_T, -1)
    return columns_BT


def positions_in(store: TileStore, rows_B: Sequence[int] | Ints, columns_BK: Ints) -> Ints:
    """(B, K) gallery positions of columns in the scores of some queries; -1 stays -1."""
    if not store.manifest.shortlist:
        return columns_BK
    positions_BK = np.full_like(columns_BK, -1)
    for b, listed_W in enumerate(_listed(store, rows_B)):
        positions_BK[b] = np.where(columns_BK[b] >= 0, listed_W[columns_BK[b]], -1)
    return positions_BK


def _listed(store: TileStore, rows_B: Sequence[int] | Ints) -> list[Ints]:
    """The shortlist of each query, with the gaps of its block."""
    step = store.manifest.grid.tile_queries
    blocks = {block: store.shortlist(block) for block in {int(q) // step for q in rows_B}}
    return [blocks[int(q) // step][int(q) % step] for q in rows_B]


def listed_targets(store: TileStore) -> NDArray[np.bool_]:
    """(queries with a target,) whether one of its targets is on the query's list."""
    rows = [q for q, query in enumerate(store.queries) if query.targets]
    columns_QT = columns_in(store, rows, [store.queries[q].targets for q in rows])
    return np.asarray((positions_in(store, rows, columns_QT) >= 0).any(axis=1))


def moments_of(store: TileStore) -> Moments | None:
    """Of every query's scores over the whole gallery, where only a shortlist of them is kept."""
    if not store.manifest.shortlist:
        return None
    of_models = np.stack([store.moments(model) for model in store.models])
    return Moments(*np.moveaxis(of_models, -1, 0)[..., None])
