"""Recall of a model under training, on queries it does not learn from."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dafm_ray.datasets.base import Dataset
from dafm_ray.datasets.images import ImageError
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.finetune.triplets import LEFT_OUT, Unfit
from dafm_ray.models.base import FrozenModel

RECALLS = (1, 5, 10, 50)


@torch.inference_mode()
def validation_recall(
    model: FrozenModel, datasets: Sequence[Dataset], device: str, batch_size: int = 64
) -> tuple[dict[str, float], list[Unfit]]:
    """Recall over whole galleries, excluded candidates masked.

    An image that cannot be read is no candidate; queries that need it count as misses.

    Args:
        model: in evaluation mode, on the device.
        datasets: the mean over them is taken.
        device: of the model.
        batch_size: images or queries at a time.

    Returns:
        `{"R@10": percent, ...}`, and the images that could not be read.
    """
    unfit: list[Unfit] = []
    hits = [_hits(model, dataset, device, batch_size, unfit) for dataset in datasets]
    means = {k: [float(100 * one[k].mean()) for one in hits] for k in RECALLS}
    return {f"R@{k}": sum(of) / len(of) for k, of in means.items()}, unfit


def _hits(
    model: FrozenModel, dataset: Dataset, device: str, batch_size: int, unfit: list[Unfit]
) -> dict[int, NDArray[np.bool_]]:
    """K -> hit or miss of every labelled query."""
    gallery = dataset.gallery
    images = GalleryImages(model, dataset, device, unfit)
    features_ND = torch.cat(
        [
            model.encode_gallery(images(gallery.ids[start : start + batch_size]))
            for start in range(0, len(gallery), batch_size)
        ]
    )
    queries = [query for query in dataset.queries if query.targets]
    scores: list[Tensor] = []
    for start in range(0, len(queries), batch_size):
        part = queries[start : start + batch_size]
        references = list(dict.fromkeys(query.reference for query in part))
        index = torch.tensor([references.index(query.reference) for query in part])
        captions = [model.caption(query.captions) for query in part]
        features = model.encode_queries(images(references), index.to(device), captions)
        scores.append(model.score(features, features_ND).float().cpu())
    scores_QN = torch.cat(scores).numpy()
    scores_QN[:, [gallery.position(id) for id in images.unreadable]] = float("nan")
    for row, query in zip(scores_QN, queries, strict=True):
        row[[gallery.position(id) for id in query.excluded]] = float("nan")
        if model.uses_reference and query.reference in images.unreadable:
            row[:] = float("nan")
    positions = {id: n for n, id in enumerate(gallery.ids)}
    ranks = rank_targets(scores_QN, columns_of([query.targets for query in queries], positions))
    return {k: ranks.stored <= k for k in RECALLS}


class GalleryImages:
    """Preprocessed images by id; blank where one cannot be read, which is listed."""

    def __init__(
        self, model: FrozenModel, dataset: Dataset, device: str, unfit: list[Unfit]
    ) -> None:
        self.unreadable: set[str] = set()
        self._model = model
        self._dataset = dataset
        self._device = device
        self._unfit = unfit

    def __call__(self, ids: Sequence[str]) -> Tensor:
        """(B, 3, H, W) on the device."""
        return torch.stack([self._one(id) for id in ids]).to(self._device)

    def _one(self, id: str) -> Tensor:
        gallery = self._dataset.gallery
        try:
            image = self._dataset.source.open(gallery.locators[gallery.position(id)])
        except ImageError as error:
            if id not in self.unreadable:
                self.unreadable.add(id)
                self._unfit.append(Unfit(id, LEFT_OUT, str(error)))
            image = Image.new("RGB", (8, 8))
        return self._model.preprocess(image)
