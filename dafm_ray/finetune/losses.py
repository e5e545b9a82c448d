"""Losses on the scores of a batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def in_batch_contrastive(
    scores_BN: Tensor, target_B: Tensor, same_BN: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each query's target against the other candidates of the batch.

    L = -mean_b log softmax(scores_b)[target_b]

    Args:
        scores_BN: scores times the logit scale.
        target_B: int64 column of each query's target.
        same_BN: bool, columns that show the query's target again; they are no negatives.

    Returns:
        Scalar.
    """
    if same_BN is not None:
        rows = torch.arange(len(scores_BN), device=scores_BN.device)
        negatives_BN = same_BN.clone()
        negatives_BN[rows, target_B] = False
        scores_BN = scores_BN.masked_fill(negatives_BN, float("-inf"))
    return F.cross_entropy(scores_BN, target_B)
