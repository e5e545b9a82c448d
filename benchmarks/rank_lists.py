"""P5: reciprocal rank fusion of four rank lists a query, against ranx.

Both begin with the lists in memory, ours as tiles hold them (NaN where a list does not name a
candidate), and end with the first 50 candidates of every query in order.
"""

from collections.abc import Iterator

import numpy as np
import ranx

from benchmarks.measure import ratio
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.rank import CHUNK_SCORES, top_candidates
from dafm_ray.fusion.static import RRF_K, static_fusion

SYSTEMS, QUERIES, CANDIDATES, LISTED = 4, 4148, 2315, 50
"""Four server files of CIRR's test1."""


def run() -> float:
    """Ratio of ranx, warm, to ours."""
    lists_MQK = _lists()
    scores_MQN = np.full((SYSTEMS, QUERIES, CANDIDATES), np.nan, np.float32)
    reciprocals_K = (1 / np.arange(1, LISTED + 1)).astype(np.float32)
    np.put_along_axis(scores_MQN, lists_MQK, reciprocals_K, axis=2)
    ids = [f"test1-{n}-{n % 4}-img{n % 2}" for n in range(CANDIDATES)]
    runs = [
        ranx.Run(
            {
                str(q): {ids[n]: 1 / rank for rank, n in enumerate(row, 1)}
                for q, row in enumerate(lists_QK.tolist())
            }
        )
        for lists_QK in lists_MQK
    ]

    def ours() -> None:
        for _ in _ours(scores_MQN):
            pass

    def theirs() -> ranx.Run:
        fused = ranx.fuse(runs, norm=None, method="rrf", params={"k": RRF_K})
        fused.sort()
        return fused

    fused = theirs().run
    for start, fused_BN, first_BK in _ours(scores_MQN):
        found_BK = np.take_along_axis(fused_BN, first_BK, axis=1)
        for b, found in enumerate(found_BK):
            np.testing.assert_allclose(found, list(fused[str(start + b)].values())[:LISTED])
    return ratio(ours, theirs)


def _ours(scores_MQN: Scores) -> Iterator[tuple[int, Scores, Ints]]:
    """First query, fused scores and first candidates of chunks as large as `dafm rank` reads."""
    rrf = static_fusion("rrf")
    step = CHUNK_SCORES // (SYSTEMS * CANDIDATES)
    for start in range(0, QUERIES, step):
        rows = np.arange(start, min(start + step, QUERIES))
        fused_BN = rrf(scores_MQN[:, rows[0] : rows[-1] + 1], rows)
        yield start, fused_BN, top_candidates(fused_BN, LISTED)


def _lists() -> Ints:
    """(M, Q, K) candidates; the systems agree as far as their common part goes."""
    rng = np.random.default_rng(0)
    common_QN = rng.standard_normal((QUERIES, CANDIDATES), dtype=np.float32)
    own = (rng.standard_normal(common_QN.shape, dtype=np.float32) for _ in range(SYSTEMS))
    return np.stack([np.argsort(-common_QN - own_QN, axis=1)[:, :LISTED] for own_QN in own])
