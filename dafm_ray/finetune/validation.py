"""Recall of a model under training, on queries it does not learn from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dafm_ray.datasets.base import Dataset
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.models.base import FrozenModel

RECALLS = (1, 5, 10, 50)


@torch.inference_mode()
def validation_recall(
    model: FrozenModel, dataset: Dataset, device: str, batch_size: int = 64
) -> dict[str, float]:
    """`{"R@10": percent, ...}` over the whole gallery, excluded candidates masked."""
    gallery = dataset.gallery
    encoded = [
        model.encode_gallery(
            _images(model, dataset, gallery.locators[start : start + batch_size], device)
        )
        for start in range(0, len(gallery), batch_size)
    ]
    features_ND = torch.cat(encoded)
    scores: list[Tensor] = []
    for start in range(0, len(dataset.queries), batch_size):
        queries = dataset.queries[start : start + batch_size]
        references = list(dict.fromkeys(query.reference for query in queries))
        index = torch.tensor([references.index(query.reference) for query in queries])
        locators = [gallery.locators[gallery.position(id)] for id in references]
        images = _images(model, dataset, locators, device)
        captions = [model.caption(query.captions) for query in queries]
        features = model.encode_queries(images, index.to(device), captions)
        scores.append(model.score(features, features_ND).float().cpu())
    scores_QN = torch.cat(scores).numpy()
    for row, query in zip(scores_QN, dataset.queries, strict=True):
        row[[gallery.position(id) for id in query.excluded]] = float("nan")
    positions = {id: n for n, id in enumerate(gallery.ids)}
    targets_QT = columns_of([query.targets for query in dataset.queries], positions)
    ranks = rank_targets(scores_QN, targets_QT)
    ranks = ranks.select(np.flatnonzero(ranks.targets))
    return {f"R@{k}": float(100 * (ranks.stored <= k).mean()) for k in RECALLS}


def _images(model: FrozenModel, dataset: Dataset, locators: Sequence[str], device: str) -> Tensor:
    opened = [model.preprocess(dataset.source.open(locator)) for locator in locators]
    return torch.stack(opened).to(device)
