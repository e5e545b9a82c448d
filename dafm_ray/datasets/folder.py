"""Own data: a folder of images and `queries.jsonl`.

One query a line: {"id", "reference", "text" or "captions", "target" or "targets" (optional),
"group" (optional), "category" (optional)}. Images are named by their path relative to the folder,
or inside their shards. The gallery is every image, or the lines of `gallery.txt`.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.annotations import (
    is_text,
    parse_json,
    place_of,
    read_queries,
    read_text,
    texts,
)
from dafm_ray.datasets.base import Draft, Query, exclude_reference
from dafm_ray.datasets.images import SUFFIXES
from dafm_ray.datasets.sources import image_files
from dafm_ray.errors import DataError
from dafm_ray.storage import Storage, open_storage
from dafm_ray.uris import last_part, shown

QUERIES = "queries.jsonl"
GALLERY = "gallery.txt"
_KEYS = frozenset({"id", "reference", "text", "captions", "target", "targets", "group", "category"})


def read_folder(config: DatasetConfig, names: Sequence[str] | None = None) -> Draft:
    """Read a folder; the reference is taken out of its own ranking.

    Args:
        config: its root.
        names: of the images, if they are not plain files below the root.

    Raises:
        DataError: no folder or no queries.
        MachineError: there is no such bucket, or its server refuses or does not answer.
    """
    root = shown(config.root)
    folder = open_storage(config.root)
    if not config.root or not folder.has_folder(""):
        raise DataError(f"there is no folder {root!r}; set dataset.root to the folder of images")
    if folder.exists(GALLERY):
        names = [line for line in _lines(folder, GALLERY) if line.strip()]
    elif names is None:
        listed = folder.list("")
        names = [path for path in listed if PurePosixPath(path).suffix.lower() in SUFFIXES]
    unspeakable = [name for name in names if not is_text(name)]
    if unspeakable:
        raise DataError(f"{root}: the file name {unspeakable[0]!r} is not UTF-8; rename it")
    if not folder.exists(QUERIES):
        raise DataError(f"{root} holds no {QUERIES}; write one query a line")
    where, lines = place_of(folder, QUERIES), enumerate(_lines(folder, QUERIES), 1)
    queries, problems = read_queries(
        ((f"{where}:{n}", line) for n, line in lines if line.strip()), _query
    )
    return Draft(
        name="folder",
        split=last_part(config.root),
        protocol="folder",
        policy="mask",
        images=tuple((name, name) for name in names),
        queries=queries,
        source=image_files(folder.uri),
        problems=problems,
    )


def _query(line: str, where: str) -> Query:
    values: dict[str, Any] = parse_json(line, where)
    if not isinstance(values, dict):
        raise DataError(f"{where} must be a JSON object")
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    for one, many in (("text", "captions"), ("target", "targets")):
        if one in values and many in values:
            raise DataError(f"{where}: {one!r} and {many!r} say the same; keep one")
    captions = _texts(values, "captions", "text", where)
    if not captions or not any(caption.strip() for caption in captions):
        raise DataError(f"{where}: 'text' is missing or empty")
    reference = values.get("reference")
    if not isinstance(reference, str) or not reference:
        raise DataError(f"{where}: 'reference' must be the name of an image")
    targets = _texts(values, "targets", "target", where)
    if reference in targets or "" in targets:
        raise DataError(f"{where}: a target is empty or is the reference, which is never ranked")
    given, category = values.get("id"), values.get("category")
    if not isinstance(given, str | int | None) or isinstance(given, bool):
        raise DataError(f"{where}: 'id' must be text or a whole number, found {given!r}")
    if not isinstance(category, str | None):
        raise DataError(f"{where}: 'category' must be text, found {category!r}")
    return Query(
        id=where.rsplit(":", 1)[1] if given in (None, "") else str(given),
        reference=reference,
        captions=captions,
        targets=targets,
        excluded=exclude_reference(reference, "mask"),
        group=_texts(values, "group", "group", where),
        fold_group=reference,
        category=category or "",
    )


def _texts(values: dict[str, Any], many: str, one: str, where: str) -> tuple[str, ...]:
    found = values.get(many, values.get(one))
    if found is None:
        return ()
    return texts([found] if isinstance(found, str) else found, many, where)


def _lines(folder: Storage, file: str) -> list[str]:
    return read_text(folder, file).split("\n")
