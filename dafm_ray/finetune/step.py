"""One optimiser step, also for batches whose activations do not fit."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from dafm_ray.errors import DataError
from dafm_ray.finetune.objective import AnyRows, Objective, several_workers, total_loss
from dafm_ray.models.base import Contrast, Terms


def step(
    forward: nn.Module,
    objective: Objective[AnyRows],
    batch: AnyRows,
    optimiser: torch.optim.Optimizer,
    scaler: GradScaler,
    chunk: int = 0,
    clip: float = 0.0,
) -> float:
    """Accumulate the gradients of a batch and take a step.

    With `chunk` only the features of the whole batch are held: they are computed without
    gradients, the loss and its gradients with respect to them follow, and then chunk after chunk is
    computed again and takes its share back (Gao et al., "Scaling deep contrastive learning batch
    size under memory limited setup", RepL4NLP 2021). Penalties and batch statistics are those of
    the chunks.

    Args:
        forward: `objective`, perhaps wrapped for gradient synchronisation.
        objective: whose terms are minimised.
        batch: of this worker.
        optimiser: of what learns.
        scaler: of the loss; disabled but for fp16.
        chunk: rows at a time; 0 takes all.
        clip: longest gradient over all parameters; 0 leaves it.

    Returns:
        The loss of the global batch before the step.

    Raises:
        DataError: a loss that is no number.
    """
    optimiser.zero_grad(set_to_none=True)
    size = len(batch)
    if not chunk or chunk >= size:
        loss = total_loss(forward(batch), batch.target_ids_B, objective.model)
        value = _agreed(loss)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    else:
        parts = [batch.rows(start, start + chunk) for start in range(0, size, chunk)]
        value = _in_chunks(forward, objective, parts, batch, scaler)
    if clip:
        scaler.unscale_(optimiser)
        learning = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(learning, clip)
    scaler.step(optimiser)
    scaler.update()
    return value


def _in_chunks(
    forward: nn.Module,
    objective: Objective[AnyRows],
    parts: Sequence[AnyRows],
    batch: AnyRows,
    scaler: GradScaler,
) -> float:
    buffers = {name: b.clone() for name, b in objective.named_buffers()}
    states, seen = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(objective.device))
            seen.append(objective(part))
    for name, buffer in objective.named_buffers():
        buffer.copy_(buffers[name])
    shares = [len(part) / len(batch) for part in parts]
    whole = _joined(seen, shares)
    loss = total_loss(whole, batch.target_ids_B, objective.model)
    value = _agreed(loss)
    if whole.contrasts:
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    start = 0
    for n, (part, state, share) in enumerate(zip(parts, states, shares, strict=True)):
        rows = slice(start, start + len(part))
        start += len(part)
        with _synchronised(forward, last=n == len(parts) - 1):
            _set_random_state(state, objective.device)
            _share_of_gradient(forward(part), whole, rows, share, scaler).backward()  # type: ignore[no-untyped-call]
    return value


def _joined(seen: Sequence[Terms], shares: Sequence[float]) -> Terms:
    """The terms of all chunks as one; its features and scales are leaves that take gradients."""
    contrasts = {}
    for name, first in seen[0].contrasts.items():
        scale = first.scale
        contrasts[name] = Contrast(
            first.weight,
            scale.detach().clone().requires_grad_() if isinstance(scale, Tensor) else scale,
            *(
                torch.cat([getattr(terms.contrasts[name], side) for terms in seen])
                .detach()
                .requires_grad_()
                for side in ("queries", "candidates")
            ),
        )
    penalties = {
        name: (
            weight,
            torch.stack(
                [s * t.penalties[name][1].float() for t, s in zip(seen, shares, strict=True)]
            ).sum(),
        )
        for name, (weight, _) in seen[0].penalties.items()
    }
    return Terms(contrasts, penalties)


def _share_of_gradient(
    terms: Terms, whole: Terms, rows: slice, share: float, scaler: GradScaler
) -> Tensor:
    """A scalar whose gradient is what the loss of the whole batch owes to this chunk."""
    total: Any = 0.0
    for name, contrast in terms.contrasts.items():
        asked = whole.contrasts[name]
        for side in ("queries", "candidates"):
            gradient = getattr(asked, side).grad
            if gradient is not None:
                total = total + (getattr(contrast, side) * gradient[rows]).sum()
        if isinstance(contrast.scale, Tensor) and isinstance(asked.scale, Tensor):
            gradient = asked.scale.grad
            if gradient is not None and contrast.scale.requires_grad:
                total = total + share * contrast.scale * gradient
    for weight, penalty in terms.penalties.values():
        total = total + scaler.scale(share * weight * penalty.float())
    gathered: Tensor = total
    return gathered


def _agreed(loss: Tensor) -> float:
    """The mean over the workers; DataError on every one of them if it is no number."""
    mean = loss.detach().clone()
    if several_workers():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    value = float(mean)
    if not torch.isfinite(mean):
        raise DataError(f"the loss is {value}; lower learning_rate")
    return value


@contextlib.contextmanager
def _synchronised(forward: nn.Module, last: bool) -> Iterator[None]:
    """Gradients travel between workers with the last chunk only."""
    wait = getattr(forward, "no_sync", None)
    with contextlib.nullcontext() if last or wait is None else wait():
        yield


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
