"""Triplets of data sets, decoded and preprocessed for training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dafm_ray.datasets.base import Dataset, Gallery, Query
from dafm_ray.datasets.images import ImageError
from dafm_ray.errors import DataError
from dafm_ray.models.base import FrozenModel

EMPTY = "the text is empty"
LEFT_OUT, CUT = "left out", "cut"


@dataclass(frozen=True, order=True)
class Unfit:
    """Something of a data set that training could not use as it is.

    Attributes:
        item: query or image.
        what: `left out` or `cut`.
        reason: why.
    """

    item: str
    what: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B triplets.

    Attributes:
        references_B3HW: preprocessed reference images.
        targets_B3HW: preprocessed target images.
        captions_B: joined captions.
        target_ids_B: equal numbers are equal targets, int64.
        unfit: images that could not be read; other triplets stand in for theirs.
    """

    references_B3HW: Tensor
    targets_B3HW: Tensor
    captions_B: list[str]
    target_ids_B: Tensor
    unfit: tuple[Unfit, ...] = ()

    def __len__(self) -> int:
        return len(self.captions_B)

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the triplets."""
        return Batch(
            self.references_B3HW[start:stop],
            self.targets_B3HW[start:stop],
            self.captions_B[start:stop],
            self.target_ids_B[start:stop],
        )

    def shifted(self, pixels: int) -> "Batch":
        """Every image moved at random; see `shifted`."""
        return replace(
            self,
            references_B3HW=shifted(self.references_B3HW, pixels),
            targets_B3HW=shifted(self.targets_B3HW, pixels),
        )


@dataclass(frozen=True)
class Triplet:
    """Reference, texts and target of a query.

    Attributes:
        place: number of its data set.
        reference: gallery id.
        captions: modification texts.
        target: gallery id.
        target_id: the same for pictures that are equal targets of a query.
    """

    place: int
    reference: str
    captions: tuple[str, ...]
    target: str
    target_id: int


Item = tuple[Tensor, Tensor, str, int, tuple[Unfit, ...]]


class Triplets(TorchDataset[Item]):
    """(reference, target, caption, target id) of every query with a target and a text.

    Decoded images are kept in memory up to `cache_bytes`. An image that cannot be read is listed,
    and the next triplet stands in for its own.

    Args:
        datasets: whose queries and images.
        model: preprocesses.
        identity: add one triplet an image: itself, an empty text, itself.
        cache_bytes: of decoded images.

    Attributes:
        unfit: queries whose text is empty or longer than the model reads.

    Raises:
        DataError: no query can be learnt from.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        model: FrozenModel,
        identity: bool = False,
        cache_bytes: int = 500_000_000,
    ) -> None:
        self.datasets = datasets
        self.model = model
        sizes = [len(dataset.gallery) for dataset in datasets]
        firsts = [sum(sizes[:place]) for place in range(len(sizes))]
        usable, self.unfit = learnable(datasets, model)
        self.triplets = [
            _triplet(place, query, datasets[place].gallery, firsts[place])
            for place, query in usable
        ]
        if identity:
            self.triplets += [
                Triplet(place, id, ("",), id, firsts[place] + n)
                for place, dataset in enumerate(datasets)
                for n, id in enumerate(dataset.gallery.ids)
            ]
        self._cache: dict[tuple[int, str], Image.Image] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, index: int) -> Item:
        unfit: list[Unfit] = []
        for n in range(len(self)):
            triplet = self.triplets[(index + n) % len(self)]
            images = []
            for id in (triplet.reference, triplet.target):
                try:
                    images.append(self.model.preprocess(self._image(triplet.place, id)))
                except ImageError as error:
                    unfit.append(Unfit(id, LEFT_OUT, str(error)))
                    break
            if len(images) == 2:
                caption = self.model.caption(triplet.captions)
                return images[0], images[1], caption, triplet.target_id, tuple(unfit)
        raise DataError(f"no triplet has images that can be read; the first: {unfit[0].reason}")

    def _image(self, place: int, id: str) -> Image.Image:
        if (place, id) not in self._cache:
            dataset = self.datasets[place]
            image = dataset.source.open(dataset.gallery.locators[dataset.gallery.position(id)])
            size = image.width * image.height * len(image.getbands())
            if size > self._room:
                return image
            self._room -= size
            self._cache[place, id] = image
        return self._cache[place, id]


def learnable(
    datasets: Sequence[Dataset], model: FrozenModel
) -> tuple[list[tuple[int, Query]], list[Unfit]]:
    """The queries that have a target and a text, each with the number of its data set, and what is
    wrong with the others.

    Raises:
        DataError: there is none.
    """
    usable: list[tuple[int, Query]] = []
    unfit: list[Unfit] = []
    for place, dataset in enumerate(datasets):
        for query in dataset.queries:
            if not query.targets:
                continue
            if not any(caption.strip() for caption in query.captions):
                unfit.append(Unfit(query.id, LEFT_OUT, EMPTY))
                continue
            if model.cuts(model.caption(query.captions)):
                unfit.append(Unfit(query.id, CUT, "the text is longer than the model reads"))
            usable.append((place, query))
    if not usable:
        names = ", ".join(f"{dataset.name}:{dataset.split}" for dataset in datasets)
        raise DataError(f"{names} has no query with a target and a text")
    return usable, unfit


def _triplet(place: int, query: Query, gallery: Gallery, first: int) -> Triplet:
    equal = min(gallery.position(target) for target in query.targets)
    return Triplet(place, query.reference, query.captions, query.targets[0], first + equal)


def epoch_batches(
    items: int, batch_size: int, seed: int, epoch: int, rank: int, workers: int
) -> list[list[int]]:
    """This worker's share of every full batch of an epoch, in an order the seed fixes."""
    order = np.random.default_rng((seed, epoch)).permutation(items)
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
    references, targets, captions, ids, unfit = zip(*items, strict=True)
    return Batch(
        torch.stack(references),
        torch.stack(targets),
        list(captions),
        torch.tensor(ids),
        tuple(one for several in unfit for one in several),
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
