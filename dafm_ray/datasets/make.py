"""The icons written out in the layout of CIRR or of FashionIQ.

Real files for the real loaders: a smoke test of a pipeline before the photos are there. `cirr-like`
keeps the icons' ids, captions and groups, so a query without pixel twins has the same candidates
and the same hit. `fashioniq-like` gives every concept one of the three categories and every query
two captions.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Dataset, Query, hash_key
from dafm_ray.datasets.fashioniq import CATEGORIES
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DataError, refusals
from dafm_ray.progress import Progress, progress

_CIRR = {"train": ("train", "train"), "val": ("val", "dev"), "test": ("test1", "test1")}
"""Split of the icons -> split of CIRR and folder of its images."""

_TRAIN_FOLDERS = 100
"""CIRR keeps its train images in so many numbered folders."""


def make_cirr_like(out: Path) -> None:
    """Write all icons in the layout of CIRR; test1 has no targets, as published.

    Raises:
        DataError: the folder holds something already.
        MachineError: the folder cannot be written.
    """
    _make(out, _cirr_split)


def make_fashioniq_like(out: Path) -> None:
    """Write all icons in the layout of FashionIQ; test has no targets, as published.

    Raises:
        DataError: the folder holds something already.
        MachineError: the folder cannot be written.
    """
    _make(out, _fashioniq_split)


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "cirr-like": make_cirr_like,
    "fashioniq-like": make_fashioniq_like,
}

Files = Iterator[tuple[str, Any]]
"""Annotation files: path and JSON value."""


def _make(out: Path, write_split: Callable[[Path, str, Dataset, Progress], Files]) -> None:
    with refusals(out):
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out} is not empty; choose a new folder")
        datasets = {split: load_dataset(DatasetConfig("icons", split)) for split in _CIRR}
        total = sum(len(dataset.gallery) for dataset in datasets.values())
        with progress("write images", total, unit="image") as shown:
            for split, dataset in datasets.items():
                for path, value in write_split(out, split, dataset, shown):
                    file = out / path
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _cirr_split(out: Path, split: str, dataset: Dataset, shown: Progress) -> Files:
    named, folder = _CIRR[split]
    places: dict[str, str] = {}
    for n, id in enumerate(sorted(dataset.gallery.ids)):
        below = f"{folder}/{n % _TRAIN_FOLDERS}" if split == "train" else folder
        places[id] = f"./{below}/{id}.png"
    _write_images(out, dataset, places, shown)
    yield f"image_splits/split.rc2.{named}.json", places
    queries = sorted(dataset.queries, key=lambda query: query.id)
    sets = {group: n for n, group in enumerate(dict.fromkeys(q.fold_group for q in queries))}
    yield (
        f"captions/cap.rc2.{named}.json",
        [_cirr_entry(n, query, sets, named != "test1") for n, query in enumerate(queries)],
    )


def _cirr_entry(n: int, query: Query, sets: dict[str, int], labelled: bool) -> dict[str, Any]:
    target = query.targets[0]
    members = list(query.group)
    labels = {"target_hard": target, "target_soft": {target: 1.0}} if labelled else {}
    ranks = {"target_rank": members.index(target)} if labelled else {}
    return {
        "pairid": n,
        "reference": query.reference,
        **labels,
        "caption": query.captions[0],
        "img_set": {
            "id": sets[query.fold_group],
            "members": members,
            "reference_rank": members.index(query.reference),
            **ranks,
        },
    }


def _fashioniq_split(out: Path, split: str, dataset: Dataset, shown: Progress) -> Files:
    places = {id: f"images/{id}.png" for id in sorted(dataset.gallery.ids)}
    _write_images(out, dataset, places, shown)
    queries = sorted(dataset.queries, key=lambda query: query.id)
    concept = {id: q.fold_group for q in queries for id in (q.reference, q.targets[0])}
    for category in CATEGORIES:
        ids = [id for id in places if _category(concept.get(id, id)) == category]
        yield f"image_splits/split.{category}.{split}.json", ids
        entries = [
            _fashioniq_entry(query, split != "test")
            for query in queries
            if _category(query.fold_group) == category
        ]
        yield f"captions/cap.{category}.{split}.json", entries


def _category(concept: str) -> str:
    """All icons of a concept are of one category, so that queries stay inside it."""
    return CATEGORIES[hash_key(concept)[0][0] % len(CATEGORIES)]


def _fashioniq_entry(query: Query, labelled: bool) -> dict[str, Any]:
    words = query.fold_group.replace("_", " ")
    return {
        **({"target": query.targets[0]} if labelled else {}),
        "candidate": query.reference,
        "captions": [query.captions[0], f"still {words}"],
    }


def _write_images(out: Path, dataset: Dataset, places: Mapping[str, str], shown: Progress) -> None:
    gallery = dataset.gallery
    for id, place in places.items():
        file = out / place
        file.parent.mkdir(parents=True, exist_ok=True)
        dataset.source.open(gallery.locators[gallery.position(id)]).save(file)
        shown.advance()
