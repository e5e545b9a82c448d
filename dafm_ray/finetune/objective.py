"""What a training step minimises, whatever it learns from."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.finetune.triplets import Unfit
from dafm_ray.models.base import Contrast, FrozenModel, Terms


class Rows(Protocol):
    """A batch of one worker.

    Attributes:
        target_ids_B: equal numbers are equal targets.
        unfit: what could not be used while it was made.
    """

    @property
    def target_ids_B(self) -> Tensor: ...  # noqa: D102, N802

    @property
    def unfit(self) -> tuple[Unfit, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Self:
        """Some of its rows."""
        ...


AnyRows = TypeVar("AnyRows", bound=Rows)


class Objective(nn.Module, ABC, Generic[AnyRows]):
    """A module whose forward pass is the terms of a batch's loss, so that gradients can be
    synchronised around it.

    Attributes:
        weights: those of the model.
        unfit: what cannot be used, known before the first step.
    """

    def __init__(self, model: FrozenModel) -> None:
        super().__init__()
        self.weights = model.module
        self.model = model
        self.unfit: list[Unfit] = []

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.weights.parameters()).device

    @property
    @abstractmethod
    def steps(self) -> int:
        """Of an epoch."""

    def begin(self, epoch: int) -> None:
        """Called before every epoch."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterable[AnyRows]:
        """This worker's batches of an epoch, in order."""

    @abstractmethod
    def forward(self, batch: AnyRows) -> Terms:
        """The terms of this worker's loss."""

    def kept(self) -> dict[str, Tensor]:
        """What an interrupted run needs besides weights."""
        return {}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take `kept` back."""


def total_loss(terms: Terms, ids_B: Tensor, model: FrozenModel) -> Tensor:
    """Contrasts of this worker's queries against the targets of all workers, and penalties. Scalar;
    its mean over the workers is the loss of the global batch.
    """
    ids_B = ids_B.to(_device_of(terms))
    loss = torch.zeros((), device=ids_B.device)
    for contrast in terms.contrasts.values():
        loss = loss + contrast.weight * _contrastive(contrast, ids_B, model)
    for weight, penalty in terms.penalties.values():
        loss = loss + weight * penalty.float()
    return loss


def _device_of(terms: Terms) -> torch.device:
    for contrast in terms.contrasts.values():
        return contrast.queries.device
    return next(penalty.device for _, penalty in terms.penalties.values())


def _contrastive(contrast: Contrast, ids_B: Tensor, model: FrozenModel) -> Tensor:
    candidates, ids_N, first = _gathered(contrast.candidates.float(), ids_B)
    scores_BN = contrast.scale * model.score(contrast.queries.float(), candidates)
    target_B = first + torch.arange(len(ids_B), device=ids_B.device)
    same_BN = ids_N[target_B][:, None] == ids_N[None, :]
    return in_batch_contrastive(scores_BN, target_B, same_BN)


def _gathered(features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """Candidates and target ids of all workers, and where this worker's begin."""
    if not several_workers():
        return features, ids, 0
    from torch.distributed.nn.functional import all_gather

    everywhere = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, ids)
    parts = all_gather(features)  # type: ignore[no-untyped-call]
    return torch.cat(parts), torch.cat(everywhere), dist.get_rank() * len(ids)


def several_workers() -> bool:
    """Whether others train the same model."""
    return dist.is_initialized() and dist.get_world_size() > 1
