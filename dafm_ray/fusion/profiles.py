"""How much a candidate resembles the query's reference, judged by scores alone.

Two images that score alike for the queries of a bank are alike to the model. So the profile of a
candidate is its column of z-scores over the bank, and the similarity of two candidates is the
correlation of their profiles. A profile is kept as a random projection (Johnson and Lindenstrauss,
1984), which adds up over folds as the sums of the bank do:

    p_n = sum_q r_q (z_qn - mean_q z_qn),    r_q ~ N(0, 1)^D, fixed by the query's id

No image, no label and no feature is needed, so it works for scores made elsewhere.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.progress import progress
from dafm_ray.tiles.store import TileStore

SIZE = 128
"""D + 1: the first direction is 1 for every query, so that its sum is that of the scores."""

CACHE_BYTES = 128_000_000
"""Of unit profiles, one set for each choice of folds left out."""

Sums = NDArray[np.float32]


@dataclass(frozen=True)
class Profiles:
    """Profiles of every candidate, fold by fold.

    Attributes:
        sums_FMND: float32, sum of r_q z_qn over the queries of each fold; behind the candidates
            stands one whose z-score is always 1, so that its sum is that of r_q.
    """

    sums_FMND: Sums
    _known: "OrderedDict[tuple[int, ...], Scores]" = field(default_factory=OrderedDict, repr=False)

    def without(self, *folds: int) -> Scores:
        """(M, N, D) float32 centred profiles of length 1, from all folds but some."""
        left_out = tuple(sorted(set(folds) - {NOBODY}))
        if left_out in self._known:
            self._known.move_to_end(left_out)
            return self._known[left_out]
        sums_MND = np.zeros(self.sums_FMND.shape[1:], np.float32)
        for fold, part_MND in enumerate(self.sums_FMND):
            if fold not in left_out:
                sums_MND += part_MND
        count = max(float(sums_MND[0, -1, 0]), 1.0)
        profiles_MND = sums_MND[:, :-1, 1:]
        profiles_MND -= sums_MND[:, :-1, :1] / count * sums_MND[:, -1:, 1:]
        lengths_MN1 = np.linalg.norm(profiles_MND, axis=-1, keepdims=True)
        np.divide(profiles_MND, lengths_MN1, out=profiles_MND, where=lengths_MN1 > 0)
        while len(self._known) >= max(1, CACHE_BYTES // sums_MND.nbytes):
            self._known.popitem(last=False)
        self._known[left_out] = profiles_MND
        return profiles_MND

    def similarities(self, references_B: Ints, fold_of_B: Ints, held_out: int) -> Scores:
        """(M, B, N) float32 correlations of every candidate with each query's reference.

        Args:
            references_B: position of the reference in the gallery; -1 resembles nothing (NaN).
            fold_of_B: the query's own fold, which is left out.
            held_out: a further fold that is left out.
        """
        models, candidates = self.sums_FMND.shape[1], self.sums_FMND.shape[2] - 1
        found_MBN = np.full((models, len(references_B), candidates), np.nan, np.float32)
        for fold in np.unique(fold_of_B[references_B >= 0]):
            asked = np.flatnonzero((fold_of_B == fold) & (references_B >= 0))
            unit_MND = self.without(int(fold), held_out)
            found_MBN[:, asked] = unit_MND[:, references_B[asked]] @ unit_MND.transpose(0, 2, 1)
        return found_MBN


def project(store: TileStore, fold_of_Q: Ints) -> Sums:
    """The sums of `Profiles` from a store's queries, a bounded number of scores at a time."""
    folds, models = int(fold_of_Q.max()) + 1, len(store.models)
    sums_FMND = np.zeros((folds, models, store.size("gallery") + 1, SIZE), np.float32)
    with progress("profiles", store.size("queries"), unit="query") as shown:
        for chunk in masked_scores(store):
            z_MBN = np.nan_to_num(zscore(chunk.scores_MBN))
            z_MBN = np.concatenate([z_MBN, np.ones_like(z_MBN[..., :1])], axis=-1)
            directions_BD = np.stack([_direction(store.queries[q].id) for q in chunk.rows])
            fold_of_B = fold_of_Q[chunk.rows.start : chunk.rows.stop]
            for fold in np.unique(fold_of_B):
                own_B = fold_of_B == fold
                sums_FMND[fold] += z_MBN[:, own_B].transpose(0, 2, 1) @ directions_BD[own_B]
            shown.advance(len(chunk.rows))
    return sums_FMND


def _direction(query: str) -> Scores:
    """1 and r_q."""
    seed = int.from_bytes(hashlib.blake2b(query.encode(), digest_size=8).digest(), "big")
    direction_D = np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)
    direction_D[0] = 1.0
    return direction_D
