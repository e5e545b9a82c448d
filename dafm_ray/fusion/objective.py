"""What a fusion is trained to do: bring each query's target to the front of the whole gallery.

Both objectives take scores with -inf for masked candidates, and several targets a query: each
target is ranked against everything that is no target.

Shape letters: B queries, N candidates, T targets.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, float], Tensor]


def info_nce(scores_BN: Tensor, targets_BT: Tensor, tau: float) -> Tensor:
    """DAFM, eq. 6: -log(e^(s_t / tau) / (e^(s_t / tau) + sum_j e^(s_j / tau))), mean over targets.

    Args:
        scores_BN: -inf for masked candidates.
        targets_BT: int64 columns, -1 where a query has fewer.
        tau: temperature.

    Returns:
        (B,) losses.
    """
    if targets_BT.shape[1] == 1 and (targets_BT >= 0).all():
        losses_B = torch.nn.functional.cross_entropy(
            scores_BN / tau, targets_BT[:, 0], reduction="none"
        )
        # A target that is masked is none.
        return losses_B.masked_fill(losses_B == torch.inf, 0.0)
    found_BT, target_BT, others_BN = _apart(scores_BN / tau, targets_BT)
    others_B1 = torch.logsumexp(others_BN, dim=1, keepdim=True)
    losses_BT = torch.logaddexp(target_BT, others_B1) - target_BT
    return _mean(losses_BT, found_BT)


def log_rank(scores_BN: Tensor, targets_BT: Tensor, tau: float) -> Tensor:
    """Smooth log of the rank: log(1 + sum_j sigmoid((s_j - s_t) / tau)); as `info_nce` otherwise.

    A target far down costs the logarithm of its rank, not its distance in score, so few hopeless
    queries do not decide the training.
    """
    found_BT, target_BT, others_BN = _apart(scores_BN / tau, targets_BT)
    ahead_BT = torch.sigmoid(others_BN[:, None] - target_BT[..., None]).sum(-1)
    return _mean(torch.log1p(ahead_BT), found_BT)


OBJECTIVES: dict[str, Objective] = {"info_nce": info_nce, "log_rank": log_rank}


def streamed_logsumexp(tiles: Iterable[Tensor]) -> Tensor:
    """Exact log-sum-exp over candidates that come in column tiles (B, n); (B,)."""
    total: Tensor | None = None
    for tile in tiles:
        part = torch.logsumexp(tile, dim=1)
        total = part if total is None else torch.logaddexp(total, part)
    if total is None:
        raise ValueError("no tiles")
    return total


def _apart(scaled_BN: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets there are, their scores, and all scores with -inf in place of targets."""
    found_BT = targets_BT >= 0
    columns_BT = targets_BT.clamp(min=0)
    target_BT = scaled_BN.gather(1, columns_BT)
    found_BT = found_BT & (target_BT != -torch.inf)
    # What is not found must not meet another -inf: their difference has no gradient but NaN.
    target_BT = target_BT.masked_fill(~found_BT, 0.0)
    rows_BT = torch.arange(len(scaled_BN), device=scaled_BN.device)[:, None].expand_as(columns_BT)
    is_target_BN = torch.zeros_like(scaled_BN, dtype=torch.bool)
    is_target_BN[rows_BT[found_BT], columns_BT[found_BT]] = True
    return found_BT, target_BT, scaled_BN.masked_fill(is_target_BN, -torch.inf)


def _mean(losses_BT: Tensor, found_BT: Tensor) -> Tensor:
    """Mean over the targets there are; 0 for a query without any."""
    kept_BT = torch.where(found_BT, losses_BT, torch.zeros_like(losses_BT))
    return kept_BT.sum(1) / found_BT.sum(1).clamp(min=1)
