"""Normalisations of the scores of one query under one model.

All take (..., N) scores, work along N, and leave NaN (not scored, or masked) alone. Where the
scores are those of a few candidates, `moments` are those of all.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dafm_ray.evaluation.metrics import Ints, Scores


@dataclass(frozen=True)
class Moments:
    """Of the scores of each query over the whole gallery, (..., 1) each.

    Attributes:
        mean: of the scores.
        deviation: their standard deviation.
        lowest: of the scores.
        highest: of the scores.
    """

    mean: Scores
    deviation: Scores
    lowest: Scores
    highest: Scores

    def of(self, rows_B: Ints) -> "Moments | None":
        """Those of some queries; None for queries of no store, whose scores are all at hand."""
        if (rows_B < 0).any():
            return None
        return Moments(
            self.mean[:, rows_B],
            self.deviation[:, rows_B],
            self.lowest[:, rows_B],
            self.highest[:, rows_B],
        )


class Normalise(Protocol):
    """What a normalisation is."""

    def __call__(self, scores: Scores, moments: Moments | None = None) -> Scores:
        """(..., N) scores, normalised along N."""
        ...


def zscore(scores: Scores, moments: Moments | None = None) -> Scores:
    """(x - mean) / standard deviation; 0 where all scores are equal."""
    centred, deviation = _centre(scores, moments)
    return _divide(centred, deviation)


def minmax(scores: Scores, moments: Moments | None = None) -> Scores:
    """(x - min) / (max - min); 1 where all scores are equal, so that a lone hit does not vanish."""
    present = ~np.isnan(scores)
    if moments is None:
        low = np.where(present, scores, np.inf).min(axis=-1, keepdims=True)
        high = np.where(present, scores, -np.inf).max(axis=-1, keepdims=True)
    else:
        low, high = moments.lowest.astype(scores.dtype), moments.highest.astype(scores.dtype)
    scaled = _divide(scores - low, high - low)
    return np.where(present & (high == low), np.ones_like(scores), scaled)


def dbsf(scores: Scores, moments: Moments | None = None) -> Scores:
    """Distribution-based score fusion: three standard deviations around the mean to [0, 1]."""
    centred, deviation = _centre(scores, moments)
    clipped: Scores = np.clip(_divide(centred, 6 * deviation) + 0.5, 0, 1)
    return clipped


def rank(scores: Scores, moments: Moments | None = None) -> Scores:
    """1 for the first candidate, falling by 1 / number of candidates; ties in stored order.

    Among a few candidates it is the rank among these.
    """
    return shares_of(ranks_of(scores))


def shares_of(ranks: Scores) -> Scores:
    """Ranks as `rank` counts them, in the precision of the ranks."""
    count = (~np.isnan(ranks)).sum(axis=-1, keepdims=True)
    shares: Scores = 1 - (ranks - 1) / np.maximum(count, 1).astype(ranks.dtype)
    return shares


def ranks_of(scores: Scores) -> Scores:
    """1-based ranks in descending order, ties in stored order; NaN stays NaN."""
    order = _descending(scores)
    ranks = np.empty(scores.shape, dtype=scores.dtype)
    places = np.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    np.put_along_axis(ranks, order, np.broadcast_to(places, scores.shape), axis=-1)
    np.copyto(ranks, np.nan, where=np.isnan(scores))
    return ranks


def _descending(scores: Scores) -> Ints:
    """Positions from the highest score to the lowest, ties in stored order, NaN last."""
    if scores.dtype != np.float32:
        return np.argsort(-scores, axis=-1, kind="stable")
    # Whole numbers sort much faster: the bits of a score, which 0 - x gives one zero, mapped to the
    # order of scores; below them its position.
    bits = np.where(np.isnan(scores), np.float32(np.nan), 0 - scores).view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(scores.shape[-1])
    keys.sort(axis=-1)
    keys &= 0xFFFFFFFF
    return keys


def _divide(scores: Scores, scale: Scores) -> Scores:
    """Scores / scale; 0 where the scale is 0."""
    if (scale > 0).all():
        return scores / scale
    zeros = np.where(np.isnan(scores), scores, np.zeros_like(scores))
    divided: Scores = np.divide(scores, scale, out=zeros, where=scale > 0)
    return divided


def _centre(scores: Scores, moments: Moments | None) -> tuple[Scores, Scores]:
    """Scores less their mean, and their standard deviation; the same for a query in any batch."""
    if moments is not None:
        centred = scores - moments.mean.astype(scores.dtype)
        return centred, moments.deviation.astype(scores.dtype)
    missing = np.isnan(scores)
    count = np.maximum(scores.shape[-1] - missing.sum(axis=-1, keepdims=True), 1)
    centred = np.array(scores, order="C")
    flat, gaps = centred.reshape(-1), np.flatnonzero(missing)
    flat[gaps] = 0
    # In float64 the mean of equal float32 scores is that score exactly.
    total = centred.sum(axis=-1, keepdims=True, dtype=np.float64)
    centred -= (total / count).astype(scores.dtype)
    flat[gaps] = 0
    squares = np.einsum("...n,...n->...", centred, centred)[..., None]
    flat[gaps] = np.nan
    return centred, np.sqrt(squares / count.astype(scores.dtype))


NORMALISATIONS: dict[str, Normalise] = {
    "zscore": zscore,
    "minmax": minmax,
    "rank": rank,
    "dbsf": dbsf,
    "none": lambda scores, moments=None: scores,
}
