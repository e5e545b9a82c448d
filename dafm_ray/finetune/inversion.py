"""Training of textual inversion from images alone: a network learns the words that an optimisation
found for them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dafm_ray.datasets.base import Dataset
from dafm_ray.errors import ConfigError
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.objective import Objective, several_workers
from dafm_ray.finetune.triplets import Unfit, epoch_batches
from dafm_ray.finetune.validation import GalleryImages
from dafm_ray.models.base import Contrast, FrozenModel, Terms, unit
from dafm_ray.models.inversion import optimised_words
from dafm_ray.models.zeroshot import ZeroShot

PHI = "Phi"


@dataclass(frozen=True)
class ImageRows:
    """B images by number."""

    target_ids_B: Tensor
    unfit: tuple[Unfit, ...] = ()

    def __len__(self) -> int:
        return len(self.target_ids_B)

    def rows(self, start: int, stop: int) -> "ImageRows":
        """Some of the images."""
        return ImageRows(self.target_ids_B[start:stop])


class Inversion(Objective[ImageRows]):
    """Contrast between the words of the network and those optimised for the same images (SEARLE).

    Args:
        model: `zeroshot:searle`.
        config: of the job.
        datasets: of whose galleries the images are.
        rank: of this worker.

    Raises:
        ConfigError: another model, or other parts than the network shall learn.
    """

    def __init__(
        self, model: FrozenModel, config: FinetuneConfig, datasets: Sequence[Dataset], rank: int
    ) -> None:
        super().__init__(model)
        if not isinstance(model, ZeroShot) or model.module.Phi is None:
            raise ConfigError("inversion trains zeroshot:searle; name it in `model`")
        if any(part != PHI and not part.startswith(f"{PHI}.") for part in config.parts):
            raise ConfigError(f"inversion trains the network alone; set parts to [{PHI}]")
        assert config.inversion is not None
        self._searle = model
        self._config = config
        self._settings = config.inversion
        self._rank = rank
        self._datasets = datasets
        self._features_ND = self._encode()
        self._words_NW = torch.empty(0)

    @property
    def steps(self) -> int:
        """Full batches of an epoch."""
        return len(self._features_ND) // self._config.batch_size

    def begin(self, epoch: int) -> None:
        """Optimise the words of all images, unless a run that goes on brought them."""
        if not len(self._words_NW):
            self._words_NW = self._optimise()

    def batches(self, epoch: int) -> Iterator[ImageRows]:
        """Images in an order the seed fixes."""
        config = self._config
        for rows in epoch_batches(
            len(self._features_ND),
            config.batch_size,
            config.seed,
            epoch,
            self._rank,
            config.workers,
        ):
            yield ImageRows(torch.tensor(rows))

    def forward(self, batch: ImageRows) -> Terms:
        """Cross-entropy of cos / temperature along both axes, halved."""
        rows_B = batch.target_ids_B.to(self.device)
        words_BW = unit(self._searle.words(self._features_ND[rows_B]))
        optimised_BW = unit(self._words_NW[rows_B])
        scale = 1 / self._settings.temperature
        return Terms(
            {
                "words": Contrast(0.5, scale, words_BW, optimised_BW),
                "optimised": Contrast(0.5, scale, optimised_BW, words_BW),
            }
        )

    def kept(self) -> dict[str, Tensor]:
        """The optimised words."""
        return {"words": self._words_NW.cpu()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take them back."""
        self._words_NW = kept["words"].to(self.device)

    @torch.no_grad()
    def _encode(self) -> Tensor:
        """(N, D) features of all images that can be read."""
        size = self._config.batch_size
        features = []
        self.model.module.eval()
        for dataset in self._datasets:
            images = GalleryImages(self.model, dataset, str(self.device), self.unfit)
            ids = dataset.gallery.ids
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                encoded = self._searle.towers.encode_images(images(part))
                readable = [n for n, id in enumerate(part) if id not in images.unreadable]
                features.append(encoded[readable])
        return torch.cat(features)

    def _optimise(self) -> Tensor:
        """(N, W) words; every worker takes its share of the images."""
        settings, workers = self._settings, self._config.workers
        share = -(-len(self._features_ND) // workers)
        own_MD = self._features_ND[self._rank * share : (self._rank + 1) * share]
        words = [
            optimised_words(
                self._searle.towers,
                part,
                settings.steps,
                settings.learning_rate,
                settings.weight_decay,
                settings.ema,
            )
            for part in torch.split(own_MD, self._config.batch_size)
        ]
        found = torch.cat(words)
        if not several_workers():
            return found
        everyones: list[Any] = [None] * workers
        dist.all_gather_object(everyones, found.cpu())
        return torch.cat(everyones).to(self.device)
