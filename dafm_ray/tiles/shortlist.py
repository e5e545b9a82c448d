"""Shortlists: of each query the candidates that any model puts among its first K.

A task scores one block of queries against a span of the gallery under every model, as a tile would
(similarity.py), so a score here has the bits of the one there. Of each model the first K stay, with
what the other models give them; spans are merged, and the union is committed. In the same pass
counts, sums, squares and extremes of all scores are collected: a fusion normalises by the whole
gallery, not by the few candidates it sees.

Shape letters: M models, B queries, N candidates of a tile, K kept of each model, W of all.
"""

import functools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dafm_ray.errors import DataError
from dafm_ray.progress import Progress
from dafm_ray.session import (
    Row,
    available_cpus,
    cpu_resources,
    explained,
    finished,
    one_thread,
)
from dafm_ray.tiles.blocks import Array
from dafm_ray.tiles.similarity import padded, score_block
from dafm_ray.tiles.store import TileStore, columns_key, moments_key, score_key, spans

SPAN = 8
"""Tiles along the gallery that one task searches."""

AHEAD = 2
"""Tasks submitted for every CPU."""

AT_ONCE = 1 << 19
"""Scores of which the first are taken at a time: as many as stay in a cache."""

_NOTHING = np.iinfo(np.int64).min
_LAST = 0xFFFFFFFF

Keys = NDArray[np.int64]
"""A score and its column in one whole number: higher scores first, then lower columns."""


@dataclass(frozen=True)
class Found:
    """What one span holds of a block of queries.

    Attributes:
        keys_MBK: of each model's first candidates, in no order; `_NOTHING` where there are fewer.
        scores_MMBK: under every model (the second axis), of each model's candidates (the first).
        counts_MB: candidates that the model scored.
        sums_MB: of their scores.
        squares_MB: of their scores.
        lowest_MB: of their scores.
        highest_MB: of their scores.
    """

    keys_MBK: Keys
    scores_MMBK: Array
    counts_MB: Array
    sums_MB: Array
    squares_MB: Array
    lowest_MB: Array
    highest_MB: Array

    def floor(self, k: int) -> Array:
        """(M, B) float32 lowest score that is kept; -inf while fewer than `k` are."""
        if self.keys_MBK.shape[2] < k:
            return np.full(self.counts_MB.shape, -np.inf, np.float32)
        return _scores(self.keys_MBK.min(axis=2)).astype(np.float32)


def list_candidates(
    store: TileStore, models: Sequence[str], shown: Progress, gpus: float = 0
) -> None:
    """List and score the candidates of every unfinished block of queries; needs a Ray session.

    Args:
        store: holds the features, receives the lists.
        models: all of the store's.
        shown: counts tiles.
        gpus: GPUs a task takes; 0 scores on CPUs.
    """
    import ray

    missing = set(store.missing(models))
    across = spans(len(store.tile_columns), SPAN)
    common = {"uri": store.uri, "run": uuid.uuid4().hex, "models": tuple(models)}
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": -1, "scheduling_strategy": "SPREAD"}
    on_cpus = cpu_resources()
    search = ray.remote(**options, num_gpus=gpus, resources={} if gpus else on_cpus)(search_span)
    commit = ray.remote(**options, resources=on_cpus)(commit_block)
    room = max(1, int(AHEAD * available_cpus()) // len(across))
    under_way: list[Any] = []
    for q, rows in enumerate(store.tile_rows):
        todo = [model for model in models if score_key(model, q, 0) in missing]
        if not todo:
            continue
        if len(under_way) >= room:
            _take(under_way, shown)
        row = {
            **common,
            "block": q,
            "excluded": _excluded(store, rows),
            "device": "cuda" if gpus else "cpu",
        }
        parts = [search.remote({**row, "tiles": tiles}) for tiles in across]
        under_way.append(commit.remote({**common, "block": q, "tiles": len(todo)}, *parts))
    while under_way:
        _take(under_way, shown)


def _take(under_way: list[Any], shown: Progress) -> None:
    import ray

    [done], under_way[:] = ray.wait(under_way, num_returns=1)
    shown.advance(finished(ray.get(done))["tiles"])


def _excluded(store: TileStore, rows: range) -> list[list[int]]:
    queries = store.queries[rows.start : rows.stop]
    return [[store.positions[id] for id in query.excluded] for query in queries]


def search_span(row: Row) -> Row:
    """Search the first candidates of a block of queries in a span of tiles."""
    return explained(lambda: {"found": _search_span(**row)}, row)


def _search_span(
    uri: str,
    run: str,
    models: Sequence[str],
    block: int,
    excluded: Sequence[Sequence[int]],
    device: str,
    tiles: range,
) -> Found:
    one_thread()
    store = _store(uri, run)
    rows = store.tile_rows[block]
    queries = [store.features(model, "queries", rows) for model in models]
    found: Found | None = None
    for n in tiles:
        columns = store.tile_columns[n]
        scores_MBN = np.empty((len(models), len(rows), len(columns)), np.float32)
        for m, model in enumerate(models):
            candidates = padded(store.features(model, "gallery", columns)).to(device)
            model_id = store.manifest.models[model].id
            scored = score_block(model_id, queries[m], candidates, device)
            scores_MBN[m] = scored[: len(rows), : len(columns)].astype(store.manifest.score_type)
            if np.isinf(scores_MBN[m]).any():
                raise DataError(f"{model} gives infinite scores (as {store.manifest.score_type})")
        for b, positions in enumerate(excluded):
            own = [p - columns.start for p in positions if p in columns]
            scores_MBN[:, b, own] = np.nan
        k = store.manifest.shortlist
        floor_MB = None if found is None else found.floor(k)
        here = first_of(scores_MBN, columns.start, k, floor_MB)
        found = here if found is None else merged([found, here], k)
    assert found is not None
    return found


def first_of(scores_MBN: Array, start: int, k: int, floor_MB: Array | None = None) -> Found:
    """The first candidates of one tile.

    Args:
        scores_MBN: float32; NaN where a candidate is excluded or was not scored.
        start: column of the first candidate.
        k: kept of each model.
        floor_MB: below it no candidate is wanted, because K better ones are known.
    """
    _, queries, candidates = scores_MBN.shape
    if floor_MB is None:
        floor_MB = np.stack([_floor(own_BN, k) for own_BN in scores_MBN])
    step = max(1, AT_ONCE // candidates)
    parts = [
        _first_of(scores_MBN[:, first : first + step], floor_MB[:, first : first + step], start, k)
        for first in range(0, queries, step)
    ]
    return Found(*(_side_by_side(same) for same in zip(*parts, strict=True)))


def _floor(scores_BN: Array, k: int) -> Array:
    """(B,) the K-th score of each query, -inf where there are fewer."""
    if k >= scores_BN.shape[1]:
        return np.full(len(scores_BN), -np.inf, np.float32)
    there_BN = np.where(np.isnan(scores_BN), -np.inf, scores_BN).astype(np.float32)
    kth_B: Array = np.partition(there_BN, -k, axis=1)[:, -k]
    return kth_B


def _first_of(
    scores_MBN: Array, floor_MB: Array, start: int, k: int
) -> tuple[Keys, Array, Array, Array, Array, Array, Array]:
    models, queries, candidates = scores_MBN.shape
    k = min(k, candidates)
    keys_MBK = np.full((models, queries, k), _NOTHING)
    scores_MMBK = np.full((models, models, queries, k), np.nan, np.float32)
    sums = np.zeros((3, models, queries))
    extremes = np.empty((2, models, queries), np.float32)
    for m, own_BN in enumerate(scores_MBN):
        wanted_BN = own_BN >= floor_MB[m, :, None]
        rows, columns = np.nonzero(wanted_BN)
        counts_B = np.count_nonzero(wanted_BN, axis=1)
        places = np.arange(len(rows)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
        keys_BJ = np.full((queries, max(k, counts_B.max())), _NOTHING)
        keys_BJ[rows, places] = _keys(own_BN[rows, columns], columns + start)
        best_BK = keys_BJ if keys_BJ.shape[1] == k else np.partition(keys_BJ, -k, axis=1)[:, -k:]
        keys_MBK[m] = best_BK
        filled_BK = best_BK != _NOTHING
        at_BK = np.where(filled_BK, _columns(best_BK) - start, 0)
        taken_MBK = np.take_along_axis(scores_MBN, at_BK[None], axis=2)
        scores_MMBK[m] = np.where(filled_BK, taken_MBK, np.nan)
        scored_BN = ~np.isnan(own_BN)
        values_BN = np.where(scored_BN, own_BN, 0).astype(np.float64)
        sums[:, m] = (
            scored_BN.sum(axis=1),
            values_BN.sum(axis=1),
            np.einsum("bn,bn->b", values_BN, values_BN),
        )
        extremes[0, m] = np.fmin.reduce(own_BN, axis=1, initial=np.inf)
        extremes[1, m] = np.fmax.reduce(own_BN, axis=1, initial=-np.inf)
    return keys_MBK, scores_MMBK, *sums, *extremes


def _side_by_side(parts: Sequence[Array]) -> Array:
    """Queries together; candidates, if there are any, stand last."""
    joined: Array = np.concatenate(parts, axis=1 if parts[0].ndim < 4 else 2)
    return joined


def _keys(scores: Array, columns: Keys) -> Keys:
    # The bits of a float, mapped to the order of floats; adding 0 makes one of the two zeros.
    bits = (scores + np.float32(0)).view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys: Keys = (bits.astype(np.int64) << 32) | (_LAST - columns)
    return keys


def _columns(keys: Keys) -> Keys:
    return _LAST - (keys & _LAST)


def _scores(keys: Keys) -> Array:
    """The scores of keys; -inf of `_NOTHING`."""
    bits = (keys >> 32).astype(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    return np.where(keys == _NOTHING, -np.inf, bits.view(np.float32))


def merged(parts: Sequence[Found], k: int) -> Found:
    """What several spans hold together."""
    keys_MBJ = np.concatenate([part.keys_MBK for part in parts], axis=2)
    scores_MMBJ = np.concatenate([part.scores_MMBK for part in parts], axis=3)
    if keys_MBJ.shape[2] > k:
        best_MBK = np.argpartition(keys_MBJ, -k, axis=2)[:, :, -k:]
        keys_MBJ = np.take_along_axis(keys_MBJ, best_MBK, axis=2)
        scores_MMBJ = np.take_along_axis(scores_MMBJ, best_MBK[:, None], axis=3)
    return Found(
        keys_MBJ,
        scores_MMBJ,
        np.sum([part.counts_MB for part in parts], axis=0),
        np.sum([part.sums_MB for part in parts], axis=0),
        np.sum([part.squares_MB for part in parts], axis=0),
        np.min([part.lowest_MB for part in parts], axis=0),
        np.max([part.highest_MB for part in parts], axis=0),
    )


def commit_block(row: Row, *parts: Row) -> Row:
    """Merge the spans of a block of queries and commit its list, moments and scores."""
    failed = next((part for part in parts if part["error"]), None)
    if failed is not None:
        return failed
    found = [part["found"] for part in parts]
    return explained(lambda: _commit(found=found, **row), row)


def _commit(
    uri: str, run: str, models: Sequence[str], block: int, tiles: int, found: Sequence[Found]
) -> Row:
    store = _store(uri, run)
    whole = merged(found, store.manifest.shortlist)
    columns_BW, scores_MBW = union(whole)
    store.write(columns_key(block), columns_BW)
    moments_MB4 = moments(whole)
    for m, model in enumerate(models):
        store.write(moments_key(model, block), moments_MB4[m])
        store.write(score_key(model, block, 0), scores_MBW[m].astype(store.manifest.score_type))
    return {"tiles": tiles}


def union(found: Found) -> tuple[Keys, Array]:
    """(B, W) columns of all models' candidates, ascending, then -1; and (M, B, W) float32 scores,
    NaN for -1. The last column holds no candidate of any query.
    """
    models, queries, _ = found.keys_MBK.shape
    columns_MBK = np.where(found.keys_MBK == _NOTHING, _LAST, _columns(found.keys_MBK))
    columns_BJ = columns_MBK.transpose(1, 0, 2).reshape(queries, -1)
    order_BJ = np.argsort(columns_BJ, axis=1, kind="stable")
    columns_BJ = np.take_along_axis(columns_BJ, order_BJ, axis=1)
    new_BJ = columns_BJ != _LAST
    new_BJ[:, 1:] &= columns_BJ[:, 1:] != columns_BJ[:, :-1]
    rows, taken = np.nonzero(new_BJ)
    places = (np.cumsum(new_BJ, axis=1) - 1)[rows, taken]
    columns_BW = np.full((queries, int(new_BJ.sum(axis=1).max(initial=0)) + 1), -1, np.int64)
    columns_BW[rows, places] = columns_BJ[rows, taken]
    scores_MBW = np.full((models, *columns_BW.shape), np.nan, np.float32)
    for m in range(models):
        scores_BJ = found.scores_MMBK[:, m].transpose(1, 0, 2).reshape(queries, -1)
        scores_MBW[m, rows, places] = np.take_along_axis(scores_BJ, order_BJ, axis=1)[rows, taken]
    return columns_BW, scores_MBW


def moments(found: Found) -> Array:
    """(M, B, 4) float64 mean, standard deviation, lowest and highest; NaN where nothing was
    scored.
    """
    counts_MB = np.where(found.counts_MB > 0, found.counts_MB, np.nan)
    mean_MB = found.sums_MB / counts_MB
    variance_MB = np.maximum(found.squares_MB / counts_MB - mean_MB**2, 0)
    extremes = np.where(np.isnan(counts_MB), np.nan, [found.lowest_MB, found.highest_MB])
    return np.stack([mean_MB, np.sqrt(variance_MB), *extremes], axis=-1)


@functools.lru_cache(maxsize=1)
def _store(uri: str, run: str) -> TileStore:
    """The store with all its features finished: listed once a worker."""
    return TileStore(uri)
