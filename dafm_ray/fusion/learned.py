"""Trained networks as a system of one store: each query is ranked by what has not seen it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.ablation import lacking
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.fit import CACHED_CANDIDATES
from dafm_ray.fusion.folds import folds_of_rows
from dafm_ray.fusion.inputs import Given, Inputs
from dafm_ray.fusion.lightfusion import LightFusion


@dataclass(frozen=True)
class OutOfFold:
    """A system a fold, searched or trained without it.

    Attributes:
        name: what tables call it.
        kind: of its parts.
        parts: fold -> system; `NOBODY` -> the system of queries that are in no fold.
        fold_of_Q: fold of each query of the store.
    """

    name: str
    kind: str
    parts: dict[int, Fusion]
    fold_of_Q: Ints

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """Every query by its own part."""
        fused_BN = np.empty(scores_MBN.shape[1:], scores_MBN.dtype)
        for fold, asked in by_fold(self.fold_of_Q, rows_B):
            fused_BN[asked] = self.parts[fold](scores_MBN[:, asked], rows_B[asked])
        return fused_BN


class _Part(NamedTuple):
    """Queries of one fold, at their places in the batch, and the channels of its networks."""

    fold: int
    asked: Ints
    channels_BNK: Tensor


@dataclass(frozen=True)
class Learned:
    """LightFusion networks.

    Attributes:
        name: what tables call it.
        networks: fold -> the networks that did not see it; `NOBODY` -> those of new queries.
        inputs: reads the store.
        fold_of_Q: fold of each query of the store; `NOBODY` for one that nothing was trained on.
        kind: of the table.
    """

    name: str
    networks: dict[int, tuple[LightFusion, ...]]
    inputs: Inputs
    fold_of_Q: Ints
    kind: str = "learned"

    def __call__(
        self,
        scores_MBN: Scores,
        rows_B: Ints,
        similarities_RBN: Scores | None = None,
        references_B: Ints | None = None,
    ) -> Scores:
        """Mean of the networks; as in `Fusion`, with more about queries of no store, as `Inputs.of`
        takes it.
        """
        given = self.inputs.of(scores_MBN, rows_B, similarities_RBN, references_B)
        return self._fused(given, self._parts(given))

    def without(self, scores_MBN: Scores, rows_B: Ints, models: Sequence[int]) -> Iterator[Scores]:
        """As in `Ablated`: the channels are worked out once, and those of one model are zeros where
        it scored nothing.
        """
        given = self.inputs.of(scores_MBN, rows_B)
        parts = list(self._parts(given))
        for index in models:
            rest_MBN = lacking(scores_MBN, index)
            alone_BN = np.isnan(rest_MBN).all(axis=0) > np.isnan(scores_MBN[index])
            if self.inputs.sees_reference or alone_BN.any():
                yield self(rest_MBN, rows_B)
                continue
            places = self.inputs.places(index)
            kept = [part.channels_BNK[..., places] for part in parts]
            for part in parts:
                part.channels_BNK[..., places] = 0
            yield self._fused(given, parts)
            for part, own_BNK in zip(parts, kept, strict=True):
                part.channels_BNK[..., places] = own_BNK

    def _parts(self, given: Given) -> Iterator[_Part]:
        """Fold by fold, what the networks read; zeros where a candidate is not seen."""
        for fold, asked in by_fold(self.fold_of_Q, given.rows_B):
            part = given if len(asked) == len(given.rows_B) else given.select(asked)
            channels_BNK = self.inputs.complete(part, fold)
            channels_BNK.masked_fill_(part.unseen_BN[..., None], 0)
            yield _Part(fold, asked, channels_BNK)

    def _fused(self, given: Given, parts: Iterable[_Part]) -> Scores:
        fused_BN = np.empty(tuple(given.absent_BN.shape), np.float32)
        for part in parts:
            fused_BN[part.asked] = self._mean(self.networks[part.fold], part.channels_BNK)
        fused_BN[given.absent_BN.numpy()] = np.nan
        return fused_BN

    def _mean(self, networks: Sequence[LightFusion], channels_BNK: Tensor) -> Scores:
        source_order_N = self.inputs.source_order
        step = max(1, CACHED_CANDIDATES // channels_BNK.shape[1])
        parts = []
        with torch.inference_mode():
            for start in range(0, len(channels_BNK), step):
                piece_BNK = channels_BNK[start : start + step]
                each = [network(piece_BNK, None, source_order_N) for network in networks]
                parts.append(torch.stack(each).mean(0) if len(each) > 1 else each[0])
        mean_BN: Scores = torch.cat(parts).numpy()
        return mean_BN


def by_fold(fold_of_Q: Ints, rows_B: Ints) -> list[tuple[int, Ints]]:
    """(fold, places in the batch); queries of no store, or of no fold, under `NOBODY`."""
    fold_of_B = folds_of_rows(fold_of_Q, rows_B)
    return [(int(fold), np.flatnonzero(fold_of_B == fold)) for fold in np.unique(fold_of_B)]


def mean_network(networks: Sequence[LightFusion]) -> LightFusion:
    """One network whose weights are the mean of several of one shape."""
    mean = LightFusion(networks[0].shape)
    states = [network.state_dict() for network in networks]
    mean.load_state_dict({key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]})
    return mean
