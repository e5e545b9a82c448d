"""Triplets of a data set, decoded and preprocessed for training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dafm_ray.datasets.base import Dataset
from dafm_ray.errors import DataError
from dafm_ray.models.base import FrozenModel


@dataclass(frozen=True)
class Batch:
    """B triplets.

    Attributes:
        references_B3HW: preprocessed reference images.
        targets_B3HW: preprocessed target images.
        captions_B: joined captions.
        target_ids_B: gallery position of each target, int64.
    """

    references_B3HW: Tensor
    targets_B3HW: Tensor
    captions_B: list[str]
    target_ids_B: Tensor


Item = tuple[Tensor, Tensor, str, int]


class Triplets(TorchDataset[Item]):
    """(reference, target, caption, target position) of every query with a target.

    Decoded images are kept in memory up to `cache_bytes`.

    Args:
        dataset: whose queries and images.
        model: preprocesses.
        identity: add one triplet an image: itself, an empty text, itself.
        cache_bytes: of decoded images.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: FrozenModel,
        identity: bool = False,
        cache_bytes: int = 500_000_000,
    ) -> None:
        self.dataset = dataset
        self.model = model
        self.queries = [query for query in dataset.queries if query.targets]
        if not self.queries:
            raise DataError(f"{dataset.name}:{dataset.split} has no query with a target")
        self._triplets = [(q.reference, q.captions, q.targets[0]) for q in self.queries]
        if identity:
            self._triplets += [(id, ("",), id) for id in dataset.gallery.ids]
        self._cache: dict[str, Image.Image] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self._triplets)

    def __getitem__(self, index: int) -> Item:
        reference, captions, target = self._triplets[index]
        return (
            self.model.preprocess(self._image(reference)),
            self.model.preprocess(self._image(target)),
            self.model.caption(captions),
            self.dataset.gallery.position(target),
        )

    def _image(self, id: str) -> Image.Image:
        if id not in self._cache:
            gallery = self.dataset.gallery
            image = self.dataset.source.open(gallery.locators[gallery.position(id)])
            size = image.width * image.height * len(image.getbands())
            if size > self._room:
                return image
            self._room -= size
            self._cache[id] = image
        return self._cache[id]


def epoch_batches(
    triplets: Triplets, batch_size: int, seed: int, epoch: int, rank: int, workers: int
) -> list[list[int]]:
    """This worker's share of every full batch of an epoch, in an order the seed fixes."""
    order = np.random.default_rng((seed, epoch)).permutation(len(triplets))
    share = batch_size // workers
    return [
        order[start + rank * share : start + (rank + 1) * share].tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size)
    ]


def load_batches(
    triplets: Triplets, batches: list[list[int]], loader_workers: int
) -> "DataLoader[Batch]":
    """Batches in order, decoded by `loader_workers` processes (0: in this one)."""
    return DataLoader(
        triplets,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=loader_workers,
        collate_fn=_collate,
    )


def _collate(items: Sequence[Item]) -> Batch:
    references, targets, captions, positions = zip(*items, strict=True)
    return Batch(
        torch.stack(references), torch.stack(targets), list(captions), torch.tensor(positions)
    )


def shifted(images_B3HW: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to `pixels` in each direction, edges repeated; torch's generator."""
    if not pixels:
        return images_B3HW
    height, width = images_B3HW.shape[-2:]
    padded = torch.nn.functional.pad(images_B3HW, (pixels,) * 4, mode="replicate")
    offsets_B2 = torch.randint(0, 2 * pixels + 1, (len(images_B3HW), 2)).tolist()
    moved = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, offsets_B2, strict=True)
    ]
    return torch.stack(moved)
