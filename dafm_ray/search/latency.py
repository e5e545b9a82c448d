"""How long one query takes when it comes alone."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dafm_ray.datasets.base import Dataset, Query
from dafm_ray.models.base import FrozenModel
from dafm_ray.search.encode import encode_queries
from dafm_ray.search.ranked import Ranked, first_candidates

TIMED = 200
"""Queries whose latency is measured at most, evenly spread over all of them."""

WARM_UP = 3
"""Queries before them: what runs first also allocates."""


def latency(
    model: FrozenModel,
    dataset: Dataset,
    queries: Sequence[Query],
    ranked: Ranked,
    device: str,
    top: int,
) -> dict[str, Any]:
    """Measure queries one at a time: `encode` is from the image file and the text to the query's
    feature, `search` from there to the first candidates.

    Args:
        model: frozen, on `device`.
        dataset: opens the references.
        queries: that can be encoded, at least one.
        ranked: with the index.
        device: torch device.
        top: candidates a query.

    Returns:
        `encode_ms` and `search_ms` with `p50`, `p99` and `mean`; how many queries, the device, and
        torch's threads.
    """
    places = np.linspace(0, len(queries) - 1, min(TIMED, len(queries))).round().astype(int)
    timed = [queries[n] for n in places]
    encoding, searching = [], []
    for query in [*timed[:WARM_UP], *timed]:
        started = time.perf_counter()
        feature_1D, _ = encode_queries(model, dataset, [query], device)
        encoded = time.perf_counter()
        first_candidates(ranked.index, feature_1D, ranked.excluded([query]), top)
        searching.append(1000 * (time.perf_counter() - encoded))
        encoding.append(1000 * (encoded - started))
    warm = len(timed[:WARM_UP])
    return {
        "queries": len(timed),
        "device": device,
        "threads": torch.get_num_threads(),
        "encode_ms": _spent(encoding[warm:]),
        "search_ms": _spent(searching[warm:]),
    }


def _spent(times_ms: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times_ms, [50, 99])
    found = {"p50": p50, "p99": p99, "mean": np.mean(times_ms)}
    return {name: round(float(value), 3) for name, value in found.items()}
