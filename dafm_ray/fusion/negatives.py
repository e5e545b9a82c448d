"""A few candidates a query instead of all: an approximation of the whole softmax, and named so.

Each query meets the candidates its models like best together, others at random, and its targets.
"""

import numpy as np
import torch
from torch import Tensor

from dafm_ray.config import NegativesConfig
from dafm_ray.fusion.inputs import Given


def sampled(
    given: Given, targets_BT: Tensor, negatives: NegativesConfig, seed: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose candidates.

    Args:
        given: the queries.
        targets_BT: int64 columns, -1 where a query has fewer.
        negatives: how many, of each kind.
        seed: of the random ones, which all queries share.

    Returns:
        columns_BS int64, absent_BS bool, and the targets' places among the S columns; -1 where a
        query has fewer.
    """
    count, candidates = given.absent_BN.shape
    mean_BN = given.scores_BNM.mean(-1).masked_fill(given.absent_BN, -torch.inf)
    top_BK = mean_BN.topk(min(negatives.top, candidates), dim=1).indices
    drawn = np.random.default_rng(seed).choice(
        candidates, min(negatives.random, candidates), replace=False
    )
    random_BR = torch.from_numpy(np.sort(drawn)).expand(count, -1)
    found_BT = targets_BT >= 0
    own_BT = targets_BT.clamp(min=0)

    taken_BN = given.absent_BN.clone()
    rows_BT = torch.arange(count)[:, None].expand_as(own_BT)
    taken_BN[rows_BT[found_BT], own_BT[found_BT]] = True
    absent_BK = taken_BN.gather(1, top_BK)
    taken_BN.scatter_(1, top_BK, True)
    absent_BR = taken_BN.gather(1, random_BR)
    absent_BT = ~found_BT | given.absent_BN.gather(1, own_BT)

    places_T = torch.arange(own_BT.shape[1]) + top_BK.shape[1] + random_BR.shape[1]
    places_BT = torch.where(found_BT, places_T.expand_as(own_BT), -1)
    columns_BS = torch.cat([top_BK, random_BR, own_BT], dim=1)
    return columns_BS, torch.cat([absent_BK, absent_BR, absent_BT], dim=1), places_BT
