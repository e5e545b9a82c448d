"""Ranking with any number of systems, streamed from the tiles."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dafm_ray.evaluation.metrics import (
    Ints,
    Scores,
    TargetRanks,
    rank_targets,
    subset_ranks,
)
from dafm_ray.evaluation.protocols import Protocol
from dafm_ray.evaluation.summary import SystemRanks
from dafm_ray.fusion.ablation import fused
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import columns_in
from dafm_ray.fusion.kept import Kept
from dafm_ray.fusion.static import Single
from dafm_ray.progress import Progress
from dafm_ray.tiles.store import TileStore

CHUNK_SCORES = 4_000_000
"""Scores in memory at a time, over all models; what bounds the memory of an evaluation."""


@dataclass(frozen=True)
class Chunk:
    """Some queries with the scores of every model.

    Attributes:
        rows: positions of the queries in the store.
        scores_MBN: float32, NaN where a candidate is excluded or was not scored.
    """

    rows: range
    scores_MBN: Scores


def masked_scores(store: TileStore) -> Iterator[Chunk]:
    """All queries in stored order, a bounded number of scores at a time."""
    step = max(1, CHUNK_SCORES // (len(store.models) * store.width))
    for block, rows in enumerate(store.tile_rows):
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            yield Chunk(part, _masked(store, block, slice(start, start + step), part))


def scores_of(store: TileStore, rows_B: Ints, masked: bool = True) -> Scores:
    """Scores of any queries, in the order asked for.

    Args:
        store: complete tiles of all its models.
        rows_B: positions of queries in the store.
        masked: whether excluded candidates are NaN.

    Returns:
        (M, B, N) float32, NaN where a candidate is excluded or was not scored.
    """
    step = store.manifest.grid.tile_queries
    blocks = np.unique(rows_B // step).tolist()
    width = store.width
    if store.manifest.shortlist:  # its blocks differ in width
        width = max((store.shortlist(block).shape[1] for block in blocks), default=width)
    scores_MBN = np.empty((len(store.models), len(rows_B), width), np.float32)
    for block in blocks:
        asked = np.flatnonzero(rows_B // step == block)
        rows = rows_B[asked]
        own_MBN = _masked(store, block, rows % step, rows.tolist(), masked)
        scores_MBN[:, asked, : own_MBN.shape[-1]] = own_MBN
        scores_MBN[:, asked, own_MBN.shape[-1] :] = np.nan
    return scores_MBN


def _masked(
    store: TileStore,
    block: int,
    within: slice | Ints,
    queries: Sequence[int],
    masked: bool = True,
) -> Scores:
    """(M, B, N) float32 scores of some rows of a row of tiles, excluded candidates NaN."""
    own = [store.scores(model, block, within) for model in store.models]
    scores_MBN = np.empty((len(own), *own[0].shape), np.float32)
    for scores_BN, read_BN in zip(scores_MBN, own, strict=True):
        scores_BN[:] = read_BN
    if masked and not store.manifest.shortlist:
        for row, q in enumerate(queries):
            scores_MBN[:, row, [store.positions[id] for id in store.queries[q].excluded]] = np.nan
    return scores_MBN


def singles(store: TileStore) -> list[Fusion]:
    """Every sub-model of a store as a system of its own."""
    return [Single(name, index) for index, name in enumerate(store.models)]


def rank_systems(
    store: TileStore, systems: Sequence[Fusion], protocol: Protocol, shown: Progress
) -> list[SystemRanks]:
    """Rank the targets of every query under every system, in one pass over the tiles.

    Args:
        store: complete tiles of all its models.
        systems: what ranks.
        protocol: says whether groups are ranked too.
        shown: counts queries.
    """
    ranks: list[list[TargetRanks]] = [[] for _ in systems]
    subsets: list[list[TargetRanks]] = [[] for _ in systems]
    whole = not store.manifest.shortlist  # which may lack members of a group
    grouped = (
        whole
        and bool(protocol.subset_recalls)
        and all(set(query.group) & set(query.targets) for query in store.queries if query.targets)
    )
    for chunk in masked_scores(store):
        queries = store.queries[chunk.rows.start : chunk.rows.stop]
        targets_QT = columns_in(store, chunk.rows, [query.targets for query in queries])
        groups_QG = columns_in(store, chunk.rows, [query.group for query in queries])
        for s, fused_BN in enumerate(fused(systems, chunk.scores_MBN, np.array(chunk.rows))):
            ranks[s].append(rank_targets(fused_BN, targets_QT))
            if grouped:
                subsets[s].append(subset_ranks(fused_BN, targets_QT, groups_QG))
        shown.advance(len(chunk.rows))
    return [
        SystemRanks(
            system.name,
            system.kind,
            TargetRanks.concatenate(ranks[s]),
            TargetRanks.concatenate(subsets[s]) if grouped else None,
        )
        for s, system in enumerate(systems)
    ]


def top_candidates(scores_BN: Scores, k: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """(B, k) positions of the first candidates, ties in stored order; -1 where none is left."""
    first = np.full((len(scores_BN), min(k, scores_BN.shape[1])), -1, dtype=np.int64)
    ranked_BN = scores_BN > -np.inf
    if 2 * np.count_nonzero(ranked_BN) < ranked_BN.size:
        ranked = Kept.of(ranked_BN)
        order = np.argsort(-ranked.gather(scores_BN), axis=1, kind="stable")[:, :k]
        first[:, : order.shape[1]] = np.take_along_axis(ranked.columns(), order, axis=1)
        return first
    descending = np.where(ranked_BN, -scores_BN, np.inf)
    for row, values_N in zip(first, descending, strict=True):
        last = np.partition(values_N, len(row) - 1)[len(row) - 1]
        # All that tie with the last, so that the stored order decides between them.
        kept = np.flatnonzero(values_N <= last)
        kept = kept[np.argsort(values_N[kept], kind="stable")][: len(row)]
        kept = kept[values_N[kept] < np.inf]
        row[: len(kept)] = kept
    return first
