"""Features of a gallery and of queries, in this process, block by block."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from dafm_ray.datasets.base import Dataset, Query
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.sources import opened
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.files import csv_text
from dafm_ray.models.base import FrozenModel
from dafm_ray.models.registry import load_model
from dafm_ray.progress import StatusWriter, progress
from dafm_ray.search.index import Block, Floats, Unusable
from dafm_ray.storage import Storage

QUARANTINE = "quarantine.csv"


def open_model(model_id: str, device: str) -> tuple[FrozenModel, str]:
    """A frozen model on its device, and the name of that device.

    Args:
        model_id: `family:variant@weights`.
        device: `cpu`, `cuda`, or `auto`: a GPU where torch sees one.

    Raises:
        MachineError: torch sees no GPU.
    """
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise MachineError("torch sees no GPU: install a torch with CUDA, or set device to cpu")
    if device == "auto":
        device = "cuda" if there else "cpu"
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # convolutions would keep 10 bits
    model = load_model(model_id)
    model.module.to(device)
    return model, device


def gallery_blocks(
    model: FrozenModel,
    dataset: Dataset,
    device: str,
    batch: int,
    write_status: StatusWriter | None = None,
) -> Iterator[Block]:
    """Encode a gallery in stored order; images that cannot be opened are named in their block.

    Args:
        model: frozen, on `device`.
        dataset: whose gallery.
        device: torch device.
        batch: images of a block.
        write_status: stores the bytes of `status.json`.

    Raises:
        ConfigError: the model's scores are no inner products.
    """
    gallery = dataset.gallery
    with progress("encode gallery", len(gallery), 0, "image", write_status) as shown:
        for start in range(0, len(gallery), batch):
            part = slice(start, start + batch)
            ids, images, unusable = [], [], []
            found = opened(dataset.source, gallery.locators[part])
            for id, image in zip(gallery.ids[part], found, strict=True):
                if isinstance(image, str):
                    unusable.append(Unusable(id, image))
                else:
                    images.append(model.preprocess(image))
                    ids.append(id)
            features = np.empty((0,), np.float32)
            if ids:
                with torch.inference_mode():
                    encoded = model.encode_gallery(torch.stack(images).to(device)).float().cpu()
                    if not start:
                        _refuse_other_scores(model, encoded)
                features = encoded.numpy()
            yield Block(ids, features, unusable)
            shown.advance(len(ids) + len(unusable), len(unusable))


def _refuse_other_scores(model: FrozenModel, features: Tensor) -> None:
    """An index ranks by inner products; the candidates themselves show whether the model does."""
    if features.dim() in (2, 3):
        queries_QD = features.flatten(0, -2)[:4]
        several = features if features.dim() == 3 else features[:, None]
        expected_QN = torch.einsum("qd,nvd->qnv", queries_QD, several).amax(-1)
        if torch.allclose(model.score(queries_QD, features), expected_QN, atol=1e-4):
            return
    raise ConfigError(
        f"{type(model).__name__} does not score by inner products of vectors, so no index can rank "
        "for it; use `dafm precompute`"
    )


def encode_queries(
    model: FrozenModel, dataset: Dataset, queries: Sequence[Query], device: str
) -> tuple[Floats, list[Unusable]]:
    """Encode one batch of queries.

    Args:
        model: frozen, on `device`.
        dataset: opens their references.
        queries: one batch.
        device: torch device.

    Returns:
        (Q, D) float32, NaN where the model needs a reference that cannot be opened, and those
        queries with the reason.

    Raises:
        DataError: features of a usable query are no numbers, or not one vector.
    """
    gallery = dataset.gallery
    images: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for id in dict.fromkeys(query.reference for query in queries):
        try:
            opened = dataset.source.open(gallery.locators[gallery.position(id)])
        except ImageError as error:
            opened = Image.new("RGB", (64, 64))
            if model.uses_reference:
                reasons[id] = str(error)
        images[id] = model.preprocess(opened)
    place = {id: n for n, id in enumerate(images)}
    index_Q = torch.tensor([place[query.reference] for query in queries], device=device)
    references_R3HW = torch.stack(list(images.values())).to(device)
    captions_Q = [model.caption(query.captions) for query in queries]
    with torch.inference_mode():
        encoded = model.encode_queries(references_R3HW, index_Q, captions_Q)
        features: Floats = encoded.float().cpu().numpy()
    lost = [query for query in queries if query.reference in reasons]
    usable_Q = np.array([query.reference not in reasons for query in queries])
    if features.ndim != 2 or not np.isfinite(features[usable_Q]).all():
        raise DataError(f"{type(model).__name__} gives query features that are no numbers (Q, D)")
    features[~usable_Q] = np.nan
    return features, [
        Unusable(query.id, f"reference {query.reference}: {reasons[query.reference]}")
        for query in lost
    ]


def write_quarantine(out: Storage, images: Sequence[Unusable], queries: Sequence[Unusable]) -> int:
    """List what could not be used in `quarantine.csv` of a folder of results; returns how many.

    Raises:
        MachineError: it cannot be written.
    """
    listed = [("gallery", *each) for each in images] + [("queries", *each) for each in queries]
    if listed:
        table = csv_text(("role", "id", "reason"), listed)
        out.write(QUARANTINE, pa.py_buffer(table.encode()))
    else:
        out.delete(QUARANTINE)
    return len(listed)
