"""Similarity tiles on Ray Data: features in, one committed tile a row out."""

import functools
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.models.registry import resolve
from dafm_ray.progress import Progress
from dafm_ray.session import Row, cpu_resources, explained, finished, one_thread
from dafm_ray.tiles.store import TileStore, score_key

if TYPE_CHECKING:
    from torch import Tensor

    from dafm_ray.tiles.blocks import Array

PANEL = 64
"""Operands are padded to a multiple of this many rows. Matrix kernels sum in another order at odd
edges; with whole panels a score is bit-identical under every tile size."""


def score_tiles(store: TileStore, models: Sequence[str], shown: Progress, gpus: float = 0) -> None:
    """Compute every unfinished tile of `models`; needs a Ray session.

    Args:
        store: holds the features, receives the tiles.
        models: short names in the store.
        shown: counts tiles.
        gpus: GPUs a tile takes while it is scored; 0 scores on CPUs.
    """
    import ray.data

    missing = set(store.missing(models))
    rows = [
        {"model": model, "query_block": q, "candidate_block": n}
        for model in models
        for n in range(len(store.tile_columns))
        for q in range(len(store.tile_rows))
        if score_key(model, q, n) in missing
    ]
    if not rows:
        return
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        score_tile,
        fn_kwargs={
            "uri": store.uri,
            "run": uuid.uuid4().hex,
            "device": "cuda" if gpus else "cpu",
        },
        num_cpus=1,
        num_gpus=gpus or None,
        resources={} if gpus else cpu_resources(),
    )
    for _ in map(finished, stream.iter_rows()):
        shown.advance()


def score_tile(row: Row, uri: str, run: str, device: str = "cpu") -> Row:
    """Score one query block against one candidate block and commit the tile.

    Args:
        row: model, query block and candidate block.
        uri: the store.
        run: of `score_tiles`; what a worker keeps from tile to tile ends with it.
        device: torch device.
    """
    return explained(lambda: _score_tile(row, uri, run, device), row)


def _score_tile(row: Row, uri: str, run: str, device: str) -> Row:
    one_thread()
    store = _store(uri, run)
    model, q, n = row["model"], row["query_block"], row["candidate_block"]
    queries = store.features(model, "queries", store.tile_rows[q])
    candidates = _candidates(uri, run, model, n, device)
    scored = score_block(store.manifest.models[model].id, queries, candidates, device)
    columns = store.tile_columns[n]
    tile = scored[: len(store.tile_rows[q]), : len(columns)].astype(store.manifest.score_type)
    if np.isinf(tile).any():
        raise DataError(f"{model} gives infinite scores (as {store.manifest.score_type})")
    store.write(score_key(model, q, n), tile)
    return {"tile": score_key(model, q, n)}


def score_block(model_id: str, queries: "Array", candidates: "Tensor", device: str) -> "Array":
    """(Q, ...) and padded (N', ...) features -> padded (Q', N') float32 scores."""
    import torch

    score = resolve(model_id)[0].score
    with torch.inference_mode():
        scores: Array = score(padded(queries).to(device), candidates).float().cpu().numpy()
    return scores


def padded(features: "Array") -> "Tensor":
    """Rows of zeros up to a whole number of panels."""
    import torch

    extra = -len(features) % PANEL
    filled = np.pad(features, [(0, extra), *([(0, 0)] * (features.ndim - 1))])
    return torch.from_numpy(filled)


@functools.lru_cache(maxsize=1)
def _store(uri: str, run: str) -> TileStore:
    """The store with all its features finished: listed once a worker."""
    return TileStore(uri)


@functools.lru_cache(maxsize=1)
def _candidates(uri: str, run: str, model: str, block: int, device: str) -> "Tensor":
    """The candidates of the tiles a worker scores in a row: read once."""
    store = _store(uri, run)
    return padded(store.features(model, "gallery", store.tile_columns[block])).to(device)
