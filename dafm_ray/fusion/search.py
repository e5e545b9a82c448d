"""One query that is in no store: encode it with every model, score the gallery, fuse."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Scores
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.learned import Learned
from dafm_ray.fusion.rank import top_candidates
from dafm_ray.fusion.reference import References
from dafm_ray.models.checkpoints import weights_digest
from dafm_ray.models.registry import load_model, resolve
from dafm_ray.search.index import pooled
from dafm_ray.tiles.forward import Forward, precision_of
from dafm_ray.tiles.similarity import padded, score_block
from dafm_ray.tiles.store import TileStore


class Found(NamedTuple):
    """A candidate of the answer; `rank` from 1."""

    rank: int
    id: str
    score: float


def search(
    store: TileStore,
    system: Fusion,
    image: Image.Image,
    captions: Sequence[str],
    top: int,
    excluded: Sequence[str] = (),
    reference: str = "",
) -> list[Found]:
    """The first candidates for one image and what shall differ; ties in stored order.

    Args:
        store: holds the gallery features of its models.
        system: of that store.
        image: the reference, decoded.
        captions: what the wanted image differs in.
        top: candidates.
        excluded: gallery ids that are left out.
        reference: id of the image, if it is in the gallery: it is left out too, and its profile is
            compared with.

    Raises:
        ConfigError: top is below 1, no text, an id that is not in the gallery, or a fusion that
            was made for an audit.
        DataError: scores made elsewhere cannot encode a query, or a model's weights have changed.
    """
    if top < 1:
        raise ConfigError(f"top must be at least 1, not {top}")
    if not any(caption.strip() for caption in captions):
        raise ConfigError("say in words what the wanted image differs in")
    if isinstance(system, Learned) and system.inputs.sees_reference:
        raise ConfigError("a fusion that sees the reference was made for an audit, not for search")
    excluded = [*excluded, reference] if reference else excluded
    for id in excluded:
        if id not in store.positions:
            raise ConfigError(f"{id!r} is not in the gallery of {store.uri}")
    scores_MBN = np.empty((len(store.models), 1, store.size("gallery")), np.float32)
    similarities: dict[str, Scores] = {}
    wanted = system.inputs.channels.references if isinstance(system, Learned) else ()
    for m, name in enumerate(store.models):
        forward = _forward(store, name)
        features = forward([image], [0], [tuple(captions)])
        scores_MBN[m] = _scores(store, name, features)
        if name in wanted:
            own_BD = pooled(forward([image], [0]))
            similarities[name] = References(store, (name,)).to(name, own_BD)
    gone = [store.positions[id] for id in excluded]
    scores_MBN[:, :, gone] = np.nan
    rows = np.array([-1])
    if isinstance(system, Learned):
        alike_RBN = np.stack([similarities[name] for name in wanted]) if wanted else None
        at_B = np.array([store.positions[reference] if reference else -1])
        fused_BN = system(scores_MBN, rows, alike_RBN, at_B)
    else:
        fused_BN = system(scores_MBN, rows)
    first = [int(n) for n in top_candidates(fused_BN, top)[0] if n >= 0]
    return [
        Found(rank, store.gallery_ids[n], float(fused_BN[0, n])) for rank, n in enumerate(first, 1)
    ]


def _forward(store: TileStore, name: str) -> Forward:
    """A model as it encoded the gallery, on the CPU."""
    entry = store.manifest.models[name]
    if entry.is_made_elsewhere:
        raise DataError(
            f"{store.uri}: the scores of {name} were made elsewhere, so no new query can be "
            "encoded; search a store made by `dafm precompute`"
        )
    weights = resolve(entry.id)[1].weights
    if weights_digest(weights) != entry.weights_digest:
        raise DataError(f"{weights} has changed since {store.uri} was made with it as {name}")
    return Forward(load_model(entry.id), "cpu", precision_of(entry.precision, "cpu"), 1)


def _scores(store: TileStore, name: str, features: Scores) -> Scores:
    """(1, N) scores of one query; NaN for candidates that could not be encoded."""
    parts = []
    for columns in store.tile_columns:
        candidates = store.features(name, "gallery", columns)
        scored = score_block(store.manifest.models[name].id, features, padded(candidates), "cpu")
        parts.append(scored[:1, : len(columns)])
    scores_BN: Scores = np.concatenate(parts, axis=1)
    return scores_BN
