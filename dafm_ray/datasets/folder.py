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
        names = [line for line in _lines(listed) if line.strip()]
    else:
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
    refuse_duplicates(names, f"{listed}: image")
    unspeakable = [name for name in names if not _is_text(name)]
    if unspeakable:
        raise DataError(f"{folder}: the file name {unspeakable[0]!r} is not UTF-8; rename it")
    file = folder / QUERIES
    if not file.is_file():
        raise DataError(f"{folder} holds no {QUERIES}; write one query a line")
    lines = enumerate(_lines(file), 1)
    queries = [_query(line, f"{file}:{n}") for n, line in lines if line.strip()]
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
    if not _is_text(line) or not _is_text(json.dumps(values, ensure_ascii=False)):
        raise DataError(f"{where} holds characters that are not Unicode text")
    captions = _texts(values, "captions", "text", where)
    if not captions or not any(caption.strip() for caption in captions):
        raise DataError(f"{where}: 'text' is missing or empty")
    reference = values.get("reference")
    if not isinstance(reference, str) or not reference:
        raise DataError(f"{where}: 'reference' must be the name of an image")
    targets = _texts(values, "targets", "target", where)
    if reference in targets or "" in targets:
        raise DataError(f"{where}: a target is empty or is the reference, which is never ranked")
    given = values.get("id")
    return Query(
        id=where.rsplit(":", 1)[1] if given in (None, "") else str(given),
        reference=reference,
        captions=captions,
        targets=targets,
        excluded=exclude_reference(reference, "mask"),
        group=_texts(values, "group", "group", where),
        fold_group=reference,
        category=str(values.get("category", "")),
    )


def _texts(values: dict[str, Any], many: str, one: str, where: str) -> tuple[str, ...]:
    found = values.get(many, values.get(one))
    if found is None:
        return ()
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {many!r} must be a list of strings")
    return tuple(texts)


def _lines(file: Path) -> list[str]:
    """Lines of a UTF-8 file, with or without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it") from None


def _is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; names of odd files and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
