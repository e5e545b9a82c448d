"""Supervised training: every query against the targets of the batch, with its family's own loss."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from dafm_ray.datasets.base import Dataset
from dafm_ray.errors import ConfigError, unknown
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.objective import Objective
from dafm_ray.finetune.triplets import Batch, Triplets, epoch_batches, load_batches
from dafm_ray.models.base import FrozenModel, Terms


class InBatch(Objective[Batch]):
    """The family's loss on triplets.

    Args:
        model: learns.
        config: of the job.
        datasets: of the triplets.
        rank: of this worker.
    """

    def __init__(
        self, model: FrozenModel, config: FinetuneConfig, datasets: Sequence[Dataset], rank: int
    ) -> None:
        super().__init__(model)
        self.triplets = Triplets(datasets, model, config.identity)
        self.unfit = self.triplets.unfit
        self._config = config
        self._rank = rank
        self._loss_weights = loss_weights(model, config.loss)

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        return len(self.triplets) // self._config.batch_size

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Decoded batches, each image moved at random."""
        config = self._config
        shares = epoch_batches(
            len(self.triplets), config.batch_size, config.seed, epoch, self._rank, config.workers
        )
        for batch in load_batches(self.triplets, shares, config.loader_workers):
            yield batch.shifted(config.shift)

    def forward(self, batch: Batch) -> Terms:
        """Terms of the family's loss, under the job's precision."""
        config, device = self._config, self.device
        dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=config.precision != "fp32"):
            return self.model.terms(
                batch.references_B3HW.to(device),
                batch.captions_B,
                batch.targets_B3HW.to(device),
                config.logit_scale,
                self._loss_weights,
            )


def loss_weights(model: FrozenModel, given: Mapping[str, float]) -> dict[str, float]:
    """The family's weights with the job's own values.

    Raises:
        ConfigError: a term that the family's loss does not have.
    """
    for name in given:
        if name not in model.loss_weights:
            raise ConfigError(unknown("term of this family's loss", name, model.loss_weights))
    return {**model.loss_weights, **given}
