"""Case studies: for a sample of queries, what each system puts first, as pictures."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Query
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DafmError
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.rank import masked_scores, top_candidates
from dafm_ray.tiles.store import TileStore
from dafm_ray.tiles.unpack import unpacked

SHOWN = 5
THUMBNAIL = 96


@dataclass(frozen=True)
class Shown:
    """A candidate in a ranking."""

    id: str
    is_target: bool


@dataclass(frozen=True)
class Ranking:
    """The first candidates of one system; `rank` of the best target, None if unranked."""

    system: str
    first: tuple[Shown, ...]
    rank: int | None


@dataclass(frozen=True)
class Case:
    """One query and every system's first candidates."""

    query: Query
    rankings: tuple[Ranking, ...]


def sample_cases(
    store: TileStore,
    systems: Sequence[Fusion],
    ranks: dict[str, list[int | None]],
    count: int,
    seed: int,
) -> list[Case]:
    """Cases for a random sample of queries that have targets.

    Args:
        store: the tiles.
        systems: what ranks.
        ranks: system -> rank of the best target of every query.
        count: how many queries.
        seed: of the sample.
    """
    labelled = [q for q, query in enumerate(store.queries) if query.targets]
    drawn = np.random.default_rng(seed).permutation(labelled)[:count].tolist()
    chosen = set(drawn)
    found: dict[int, Case] = {}
    for chunk in masked_scores(store):
        rows = [q for q in chunk.rows if q in chosen]
        if not rows:
            continue
        scores_MBN = chunk.scores_MBN[:, [q - chunk.rows.start for q in rows]]
        tops = {
            system.name: top_candidates(system(scores_MBN, np.array(rows)), SHOWN)
            for system in systems
        }
        for b, q in enumerate(rows):
            query = store.queries[q]
            rankings = tuple(
                Ranking(name, _shown(store, query, top[b].tolist()), ranks[name][q])
                for name, top in tops.items()
            )
            found[q] = Case(query, rankings)
    return [found[q] for q in drawn]


def _shown(store: TileStore, query: Query, positions: list[int]) -> tuple[Shown, ...]:
    ids = [store.gallery_ids[position] for position in positions if position >= 0]
    return tuple(Shown(id, id in query.targets) for id in ids)


def pictured(cases: Sequence[Case]) -> set[str]:
    """Gallery ids of every picture the cases show."""
    return {
        id
        for case in cases
        for id in (
            case.query.reference,
            *case.query.targets,
            *(shown.id for ranking in case.rankings for shown in ranking.first),
        )
    }


def thumbnails(store: TileStore, ids: Iterable[str]) -> dict[str, str]:
    """Gallery id -> data URI; unusable images are left out, and all of them where the images are
    not at hand (a store of scores alone).
    """
    try:
        dataset = load_dataset(DatasetConfig(**store.manifest.dataset))
    except (DafmError, TypeError):
        return {}
    if dataset.gallery.digest != store.manifest.gallery_digest:
        return {}
    dataset = unpacked(store, dataset)
    found: dict[str, str] = {}
    for id in sorted(ids):
        try:
            image = dataset.source.open(dataset.gallery.locators[dataset.gallery.position(id)])
        except ImageError:
            continue
        found[id] = data_uri(image)
    return found


def data_uri(image: Image.Image) -> str:
    """The smaller of PNG and JPEG, at most `THUMBNAIL` pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    encoded: list[tuple[str, bytes]] = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        encoded.append((kind, buffer.getvalue()))
    kind, data = min(encoded, key=lambda pair: len(pair[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
