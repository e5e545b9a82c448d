"""What a learned fusion sees of a query: z-scores, hub statistics, what is absent, the targets."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dafm_ray.evaluation.metrics import Ints, columns_of
from dafm_ray.fusion.bank import Bank
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import scores_of
from dafm_ray.tiles.store import TileStore

HUB = "hub:"
"""Begins the name of a model's channel of hub statistics."""


class Examples(NamedTuple):
    """Some queries.

    Attributes:
        inputs_BNK: float32 z-scores of the models, then their hub statistics if there is a bank;
            0 where a model did not score a candidate.
        absent_BN: bool, candidates that are masked or that no model scored.
        targets_BT: int64 columns of the targets, -1 where a query has fewer.
    """

    inputs_BNK: Tensor
    absent_BN: Tensor
    targets_BT: Tensor


@dataclass(frozen=True)
class Inputs:
    """Reads examples from the tiles of a store.

    Attributes:
        store: complete tiles of all its models.
        fold_of_Q: fold of each query, in stored order.
        bank: of the same folds, or None.
    """

    store: TileStore
    fold_of_Q: Ints
    bank: Bank | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """Names of the channels after the models."""
        return tuple(HUB + name for name in self.store.models) if self.bank else ()

    def __call__(self, rows_B: Ints, held_out: int) -> Examples:
        """Examples for the fit that holds a fold out, to train on or to rank.

        A query's hub statistics come from neither its own fold nor the one held out.

        Args:
            rows_B: positions of queries in the store.
            held_out: a fold.
        """
        z_MBN = zscore(scores_of(self.store, rows_B))
        absent_BN = np.isnan(z_MBN).all(axis=0)
        inputs_KBN = np.nan_to_num(z_MBN)
        if self.bank is not None:
            hubs_MBN = np.empty_like(inputs_KBN)
            fold_of_B = self.fold_of_Q[rows_B]
            for fold in np.unique(fold_of_B):
                hubs_MBN[:, fold_of_B == fold] = self.bank.without(int(fold), held_out)[:, None]
            inputs_KBN = np.concatenate([inputs_KBN, hubs_MBN])
        queries = [self.store.queries[q] for q in rows_B]
        targets_BT = columns_of([query.targets for query in queries], self.store.positions)
        return Examples(
            torch.from_numpy(np.ascontiguousarray(inputs_KBN.transpose(1, 2, 0))),
            torch.from_numpy(absent_BN),
            torch.from_numpy(targets_BT),
        )
