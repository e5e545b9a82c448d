"""Own data: a folder of images and `queries.jsonl`.

One query a line: {"id", "reference", "text" or "captions", "target" or "targets" (optional),
"group" (optional)}. Images are named by their path relative to the folder. The gallery is every
image of the folder, or the lines of `gallery.txt`.
"""

import json
from pathlib import Path
from typing import Any

from dafm_ray.datasets.base import Dataset, Gallery, Query, exclude_reference, refuse_duplicates
from dafm_ray.datasets.images import Files
from dafm_ray.errors import DataError

QUERIES = "queries.jsonl"
GALLERY = "gallery.txt"
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_KEYS = frozenset({"id", "reference", "text", "captions", "target", "targets", "group", "category"})


def load_folder(root: str) -> Dataset:
    """Open a folder; the reference is taken out of its own ranking.

    Raises:
        DataError: no folder, no queries, or a line that cannot be read (it is named).
    """
    folder = Path(root)
    if not root or not folder.is_dir():
        raise DataError(f"there is no folder {root!r}; set dataset.root to the folder of images")
    listed = folder / GALLERY
    if listed.is_file():
        names = [line for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
    refuse_duplicates(names, f"{listed}: image")
    file = folder / QUERIES
    if not file.is_file():
        raise DataError(f"{folder} holds no {QUERIES}; write one query a line")
    lines = file.read_text(encoding="utf-8").splitlines()
    queries = [_query(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    return Dataset(
        name="folder",
        split=folder.name,
        protocol="folder",
        policy="mask",
        gallery=Gallery.from_source({name: name for name in names}),
        queries=tuple(queries),
        source=Files(str(folder.resolve())),
    )


def _query(line: str, where: str) -> Query:
    try:
        values: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{where} must be a JSON object")
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}")
    captions = _texts(values, "captions", "text", where)
    if not captions:
        raise DataError(f"{where}: 'text' is missing")
    reference = values.get("reference")
    if not isinstance(reference, str) or not reference:
        raise DataError(f"{where}: 'reference' must be the name of an image")
    return Query(
        id=str(values.get("id", "")) or where.rsplit(":", 1)[1],
        reference=reference,
        captions=captions,
        targets=_texts(values, "targets", "target", where),
        excluded=exclude_reference(reference, "mask"),
        group=_texts(values, "group", "group", where),
        fold_group=reference,
        category=str(values.get("category", "")),
    )


def _texts(values: dict[str, Any], many: str, one: str, where: str) -> tuple[str, ...]:
    found = values.get(many, values.get(one)) or []
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {many!r} must be a list of strings")
    return tuple(texts)
