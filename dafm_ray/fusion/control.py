"""The control of the per-query oracle: copies of one score that differ by noise alone.

No copy knows what another does not, and each hits as many queries as a single system does; what
their oracle is above one of them is luck.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dafm_ray.evaluation.metrics import Ints, Scores, rank_targets
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import columns_in, moments_of
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import scores_of
from dafm_ray.fusion.static import static_fusion
from dafm_ray.tiles.store import TileStore

SAMPLE, SAMPLE_SCORES = 512, 2_000_000
"""Queries on which the strength of the noise is searched, fewer where galleries are large."""

LARGEST, HALVINGS = 8.0, 10
"""Of the search; in standard deviations of a query's scores."""


@dataclass(frozen=True)
class Noisy:
    """A system's z-scores with noise, the same for a query in any batch.

    Attributes:
        system: that is copied.
        sigma: standard deviation of the noise.
        copy: number of the copy.
    """

    system: Fusion
    sigma: float
    copy: int
    kind: str = "control"

    @property
    def name(self) -> str:
        """The system's, and which copy."""
        return f"noisy {self.system.name} {self.copy}"

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """z + sigma times a normal value a candidate."""
        fused_BN = zscore(self.system(scores_MBN, rows_B))
        for fused_N, q in zip(fused_BN, rows_B.tolist(), strict=True):
            fused_N += np.float32(self.sigma) * noise(self.copy, q, len(fused_N))
        return fused_BN


def noise(copy: int, query: int, size: int) -> Scores:
    """(size,) standard normal values of a query under a copy."""
    return np.random.default_rng([copy, query]).standard_normal(size, dtype=np.float32)


def noisy_copies(store: TileStore, k: int, seed: int = 0) -> list[Noisy]:
    """As many copies of the mean of z-scores as the store has models.

    Args:
        store: complete tiles of all its models.
        k: copies hit as many of a sample of queries at `k` as the models do on average.
        seed: of the sample.
    """
    base = static_fusion("mean@zscore", moments=moments_of(store))
    labelled = [q for q, query in enumerate(store.queries) if query.targets]
    size = max(1, min(SAMPLE, SAMPLE_SCORES // store.width))
    rows_B = np.sort(np.random.default_rng(seed).permutation(labelled)[:size])
    scores_MBN = scores_of(store, rows_B)
    targets_BT = columns_in(store, rows_B, [store.queries[q].targets for q in rows_B])
    fused_BN = zscore(base(scores_MBN, rows_B))
    copies = range(len(store.models))
    noise_MBN = np.stack(
        [[noise(copy, q, fused_BN.shape[1]) for q in rows_B.tolist()] for copy in copies]
    )

    def hits(systems_MBN: Iterable[Scores]) -> int:
        return sum(int((rank_targets(s, targets_BT).stored <= k).sum()) for s in systems_MBN)

    wanted = hits(scores_MBN)
    low, high = 0.0, LARGEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = hits(fused_BN + np.float32(middle) * noise_BN for noise_BN in noise_MBN)
        low, high = (middle, high) if found > wanted else (low, middle)
    return [Noisy(base, (low + high) / 2, copy) for copy in copies]
