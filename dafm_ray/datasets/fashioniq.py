"""FashionIQ: product photos of dresses, shirts and tops, two captions a triplet.

    {annotations}/captions/cap.{category}.{train,val,test}.json
    {annotations}/image_splits/split.{category}.{train,val,test}.json    a list of ids
    {root}/images/ID.png, .jpg or .jpeg

Protocol: one gallery a category, the reference kept in it; the mean over the three categories has
no weights. "original" searches the whole split of the category; "val-split" only the references
and targets of its queries: fewer candidates, higher numbers, not comparable.
Source: Wu et al., CVPR 2021, and the files of its repository.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.annotations import (
    annotations_below,
    place_of,
    read_entries,
    read_json,
    take,
    texts,
)
from dafm_ray.datasets.base import Draft, Query
from dafm_ray.datasets.sources import image_files
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.storage import open_storage

SPLITS = ("train", "val", "test")
CATEGORIES = ("dress", "shirt", "toptee")
SUFFIXES = (".png", ".jpg", ".jpeg")
EMPTY_CAPTIONS = {
    ("train", "toptee"): 12,
    ("val", "shirt"): 1,
    ("val", "toptee"): 2,
    ("test", "shirt"): 1,
}
"""(split, category) -> captions that are published empty."""

PUBLISHED = {
    ("train", "dress"): (11_452, 5_985),
    ("val", "dress"): (3_817, 2_017),
    ("test", "dress"): (3_818, 2_024),
    ("train", "shirt"): (19_036, 5_988),
    ("val", "shirt"): (6_346, 2_038),
    ("test", "shirt"): (6_346, 2_038),
    ("train", "toptee"): (16_121, 6_027),
    ("val", "toptee"): (5_373, 1_961),
    ("test", "toptee"): (5_374, 2_056),
}
"""(split, category) -> images and queries as its authors count them."""


def read_fashioniq(config: DatasetConfig) -> Draft:
    """Read one category of one split; the test split has no targets.

    Raises:
        ConfigError: no such split or category.
        DataError: a file is missing or is not what it should be.
    """
    split, category = config.split, config.category
    if split not in SPLITS:
        raise ConfigError(unknown("split of fashioniq", split, SPLITS))
    if category not in CATEGORIES:
        raise ConfigError(
            unknown("category of fashioniq", category, CATEGORIES) + "; set dataset.category"
        )
    listed = f"image_splits/split.{category}.{split}.json"
    folder = annotations_below(config, "fashioniq", listed)
    ids = texts(read_json(folder, listed, list), "the list of images", place_of(folder, listed))
    captions = f"captions/cap.{category}.{split}.json"
    queries, problems = read_entries(
        folder, captions, lambda entry, where: _query(entry, where, category)
    )
    protocol = "fashioniq"
    if config.gallery == "val-split":
        protocol = "fashioniq-val-split"
        if not all(query.targets for query in queries):
            raise DataError(
                f"{place_of(folder, captions)} holds no targets, which the val-split gallery is "
                "made of"
            )
        named = {id for query in queries for id in (query.reference, *query.targets)}
        ids = tuple(id for id in ids if id in named)
    places = _places(config.root) if config.root else {}
    return Draft(
        name="fashioniq",
        split=split,
        protocol=protocol,
        policy="keep",
        images=tuple((id, places.get(id, f"images/{id}.png")) for id in ids),
        queries=_with_ids(queries, category),
        source=image_files(config.root),
        category=category,
        problems=problems,
    )


def _query(entry: Any, where: str, category: str) -> Query:
    reference = take(entry, "candidate", str, where)
    captions = texts(take(entry, "captions", list, where), "captions", where)
    if not captions:
        raise DataError(f"{where}: 'captions' is empty")
    labelled = "target" in entry
    return Query(
        id="",
        reference=reference,
        captions=captions,
        targets=(take(entry, "target", str, where),) if labelled else (),
        fold_group=reference,
        category=category,
    )


def _with_ids(queries: tuple[Query, ...], category: str) -> tuple[Query, ...]:
    """FashionIQ names no queries. `category/reference/target`, numbered where that is not enough
    by the order of the captions: the same whatever the order of the file.
    """
    alike: defaultdict[str, list[Query]] = defaultdict(list)
    for query in queries:
        alike["/".join((category, query.reference, *query.targets))].append(query)
    return tuple(
        replace(query, id=name if len(same) == 1 else f"{name}#{n}")
        for name, same in alike.items()
        for n, query in enumerate(sorted(same, key=lambda query: query.captions), 1)
    )


def _places(root: str) -> dict[str, str]:
    """Id -> path below the root, of the image files that are there; PNG first."""
    found: dict[str, str] = {}
    listed = [PurePosixPath(path) for path in open_storage(root).list("images")]
    files = [path for path in listed if len(path.parts) == 2]
    for suffix in reversed(SUFFIXES):
        found |= {f.stem: str(f) for f in files if f.suffix.lower() == suffix}
    return found
