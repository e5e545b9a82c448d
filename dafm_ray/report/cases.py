"""Case studies: for a sample of queries, what each system puts first, as pictures."""

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dafm_ray.config import DatasetConfig, EvaluateConfig
from dafm_ray.datasets.base import Query
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DafmError
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import positions_in
from dafm_ray.fusion.rank import scores_of, top_candidates
from dafm_ray.tiles.store import TileStore
from dafm_ray.tiles.unpack import unpacked

SHOWN = 5
THUMBNAIL = 96

Ranks = Mapping[str, Sequence[int | None]]
"""System -> rank of the best target of every query, None if it is unranked."""


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


@dataclass(frozen=True)
class CaseStudies:
    """Cases of an evaluation.

    Attributes:
        groups: title -> its cases; none is empty.
        pictures: gallery id -> data URI.
    """

    groups: dict[str, list[Case]]
    pictures: dict[str, str]


def case_studies(
    stores: Sequence[TileStore],
    systems: Sequence[Sequence[Fusion]],
    ranks: Sequence[Ranks],
    judged: tuple[str, str],
    config: EvaluateConfig,
) -> CaseStudies:
    """Choose queries of all stores, and show what every system puts first.

    Args:
        stores: of the queries.
        systems: of each store.
        ranks: of each store.
        judged: the fusion that is looked at, and the single system it is compared with.
        config: how many, and the seed.
    """
    places = [(s, q) for s, store in enumerate(stores) for q in range(store.size("queries"))]
    labelled = np.flatnonzero([bool(stores[s].queries[q].targets) for s, q in places])
    joint = {name: [rank for one in ranks for rank in one[name]] for name in ranks[0]}
    chosen = select(joint, *judged, labelled, config.cases, config.seed)
    wanted = {places[n] for queries in chosen.values() for n in queries}
    found: dict[tuple[int, int], Case] = {}
    pictures: dict[str, str] = {}
    for s, store in enumerate(stores):
        own = cases_of(store, systems[s], ranks[s], {q for at, q in wanted if at == s})
        found |= {(s, q): case for q, case in own.items()}
        pictures |= thumbnails(store, pictured(own.values()))
    groups = {title: [found[places[n]] for n in queries] for title, queries in chosen.items()}
    return CaseStudies({title: cases for title, cases in groups.items() if cases}, pictures)


def select(
    ranks: Ranks, fusion: str, single: str, labelled: Ints, count: int, seed: int
) -> dict[str, list[int]]:
    """Title -> queries that are worth a look: where a fusion gains most, where it loses most, and
    a random sample, about as many of each and none twice.

    A gain is the logarithm of rank before over rank after: from 20 to 10 counts as from 2 to 1.

    Args:
        ranks: of every query.
        fusion: that is looked at.
        single: it is compared with; the fusion itself leaves the sample alone.
        labelled: queries that have targets.
        count: of all cases.
        seed: of the sample.
    """
    drawn = np.random.default_rng(seed).permutation(labelled).tolist()
    if fusion == single:
        return {"A random sample": drawn[:count]}
    share = -(-count // 3)
    after, before = (
        np.log([ranks[name][q] or np.inf for q in labelled]) for name in (fusion, single)
    )
    both_unranked = np.isinf(after) & np.isinf(before)
    gain = np.where(both_unranked, 0.0, before - np.where(both_unranked, 0.0, after))
    order = np.argsort(-gain, kind="stable")
    wins = [int(labelled[n]) for n in order if gain[n] > 0][:share]
    losses = [int(labelled[n]) for n in order[::-1] if gain[n] < 0][:share]
    sample = [q for q in drawn if q not in {*wins, *losses}][: max(0, count - 2 * share)]
    return {
        f"Where {fusion} gains most over {single}": wins,
        f"Where {fusion} loses most to {single}": losses,
        "A random sample": sample,
    }


def cases_of(
    store: TileStore,
    systems: Sequence[Fusion],
    ranks: Ranks,
    queries: Collection[int],
) -> dict[int, Case]:
    """Query -> its case.

    Args:
        store: the tiles.
        systems: what ranks.
        ranks: of the store's queries.
        queries: positions in the store.
    """
    found: dict[int, Case] = {}
    rows_B = np.array(sorted(queries), dtype=np.int64)
    if not len(rows_B):
        return found
    scores_MBN = scores_of(store, rows_B)
    tops = {
        system.name: positions_in(store, rows_B, top_candidates(system(scores_MBN, rows_B), SHOWN))
        for system in systems
    }
    for b, q in enumerate(rows_B.tolist()):
        query = store.queries[q]
        rankings = tuple(
            Ranking(name, _shown(store, query, top[b].tolist()), ranks[name][q])
            for name, top in tops.items()
        )
        found[q] = Case(query, rankings)
    return found


def _shown(store: TileStore, query: Query, positions: list[int]) -> tuple[Shown, ...]:
    ids = [store.gallery_ids[position] for position in positions if position >= 0]
    return tuple(Shown(id, id in query.targets) for id in ids)


def pictured(cases: Iterable[Case]) -> set[str]:
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
