"""A few of many candidates of each query, side by side."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dafm_ray.evaluation.metrics import Ints


@dataclass(frozen=True)
class Kept:
    """K columns that hold the kept candidates of every query in stored order, then gaps.

    Attributes:
        shape: (B, N) of the matrix they are taken from.
        positions: of the kept candidates in that matrix, flattened.
        filled_BK: False in a gap.
    """

    shape: tuple[int, int]
    positions: Ints
    filled_BK: NDArray[np.bool_]

    @staticmethod
    def of(kept_BN: NDArray[np.bool_]) -> "Kept":
        """Keep where True; K is the most that a query keeps."""
        queries, candidates = kept_BN.shape
        counts_B1 = np.count_nonzero(kept_BN, axis=1, keepdims=True)
        filled_BK = np.arange(counts_B1.max(initial=0)) < counts_B1
        return Kept((queries, candidates), np.flatnonzero(kept_BN), filled_BK)

    def columns(self) -> Ints:
        """(B, K) columns of the kept candidates, -1 in gaps."""
        columns_BK = np.full(self.filled_BK.shape, -1, dtype=np.int64)
        columns_BK[self.filled_BK] = self.positions % self.shape[1]
        return columns_BK

    def gather(self, values_BN: NDArray[Any]) -> NDArray[Any]:
        """(B, N) -> (B, K), NaN in gaps."""
        values_BK = np.full(self.filled_BK.shape, np.nan, values_BN.dtype)
        values_BK[self.filled_BK] = values_BN.reshape(-1)[self.positions]
        return values_BK

    def scatter(self, values_BK: NDArray[Any]) -> NDArray[Any]:
        """(B, K) -> (B, N), NaN where a candidate is not kept."""
        values_BN = np.full(self.shape, np.nan, values_BK.dtype)
        values_BN.reshape(-1)[self.positions] = values_BK[self.filled_BK]
        return values_BN
