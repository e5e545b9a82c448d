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


def preference_loss(margin_BC: Tensor, beta: float, there_BC: Tensor) -> Tensor:
    """Retrieval-DPO: -log sigmoid(beta margin), a mean over a query's negatives, then over queries.

    Args:
        margin_BC: score of the positive less that of each negative; less the reference policy's
            margin, where there is one.
        beta: sharpness of the preference.
        there_BC: which negatives there are; a query without any costs nothing.

    Returns:
        Scalar.
    """
    losses_BC = -F.logsigmoid(beta * margin_BC) * there_BC
    means_B = losses_BC.sum(1) / there_BC.sum(1).clamp(min=1)
    return means_B.mean()


def smooth_log_rank(scores_BN: Tensor, target_B: Tensor, never_BN: Tensor, tau: float) -> Tensor:
    """log(1 + sum_j sigmoid((s_j - s_target) / tau)): a smooth logarithm of the target's rank.

    Args:
        scores_BN: scores of the candidates.
        target_B: int64 column of each query's target.
        never_BN: bool, candidates that the target is not ranked against, itself among them.
        tau: width of the step from "behind" to "ahead", in scores.

    Returns:
        Scalar, the mean over queries.
    """
    target_B1 = scores_BN.gather(1, target_B[:, None])
    ahead_BN = torch.sigmoid((scores_BN - target_B1) / tau).masked_fill(never_BN, 0.0)
    return torch.log1p(ahead_BN.sum(1)).mean()
