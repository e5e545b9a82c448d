"""Reading scores made elsewhere: matrices, TREC runs and CIRR server files.

A matrix is (queries, candidates) with ids beside it; a run or a server file names what it ranks. A
candidate that was not scored is missing (NaN), never zero.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np

from dafm_ray.datasets.annotations import parse_json
from dafm_ray.errors import DataError
from dafm_ray.tiles.blocks import Array

FLOATS = ("float32", "float16")
_LARGEST = float(np.finfo(np.float32).max)
ABOUT = frozenset({"scores.json", "queries.json", "query_ids.json", "gallery_ids.json"})
"""Files of a score folder that say what the scores are about."""


class ForeignScores(Protocol):
    """The scores of one system."""

    @property
    def dtype(self) -> str:
        """`float32` or `float16`."""
        ...

    @property
    def query_ids(self) -> Sequence[str] | None:
        """Ids of the rows; None if the folder's `query_ids.json` names them."""
        ...

    @property
    def gallery_ids(self) -> Sequence[str] | None:
        """Ids of the columns; None if the folder's `gallery_ids.json` names them."""
        ...

    def shape(self) -> tuple[int, int] | None:
        """(queries, candidates) of a matrix; None for what names its own."""
        ...

    def rows(self, rows: Sequence[int]) -> Array:
        """(len(rows), candidates) scores in the order of the file; NaN where there is none."""
        ...


@dataclass(frozen=True)
class Matrix:
    """A dense score matrix."""

    values: Array
    query_ids: None = None
    gallery_ids: None = None

    @property
    def dtype(self) -> str:
        """Of the file, whatever its byte order."""
        return str(self.values.dtype.name)

    def shape(self) -> tuple[int, int]:
        """(queries, candidates)."""
        return self.values.shape[0], self.values.shape[1]

    def rows(self, rows: Sequence[int]) -> Array:
        """Rows of the file."""
        chosen: Array = self.values[np.asarray(rows)]
        return chosen


@dataclass(frozen=True)
class RankLists:
    """Scores of some candidates of each query.

    Attributes:
        lists: query id -> candidate id -> score.
        gallery_ids: columns of `rows`.
        note: what a user should know about them.
    """

    lists: Mapping[str, Mapping[str, float]]
    query_ids: Sequence[str]
    gallery_ids: Sequence[str]
    dtype: str = "float32"
    note: str = ""

    def shape(self) -> None:
        """It names its own queries and candidates."""

    def rows(self, rows: Sequence[int]) -> Array:
        """Rows over the candidates that any query names."""
        column = {id: n for n, id in enumerate(self.gallery_ids)}
        scores = np.full((len(rows), len(column)), np.nan, dtype=np.float32)
        for r, row in enumerate(rows):
            for id, score in self.lists[self.query_ids[row]].items():
                scores[r, column[id]] = score
        return scores


def read_systems(folder: Path) -> tuple[dict[str, tuple[ForeignScores, Path]], list[str]]:
    """Every system of a score folder, by name.

    Returns:
        The systems with their files, and what a user should know about other files.

    Raises:
        DataError: a file cannot be read, or two files give one name.
    """
    found: dict[str, tuple[ForeignScores, Path]] = {}
    notes: list[str] = []
    for file in sorted(folder.iterdir()):
        name = file.name.removesuffix(".gz")
        stem, suffix = Path(name).stem, Path(name).suffix
        hidden = file.name.startswith(".")
        if suffix not in _READERS or not file.is_file() or file.name in ABOUT or hidden:
            continue
        scores = _READERS[suffix](file)
        if isinstance(scores, str):
            notes.append(f"{file.name} is left out: {scores}")
        elif scores is not None:
            if stem in found:
                raise DataError(f"{file} and {found[stem][1]} are both named {stem!r}; rename one")
            found[stem] = (scores, file)
            if isinstance(scores, RankLists) and scores.note:
                notes.append(scores.note)
    return found, notes


def _read_npy(file: Path) -> Matrix:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is not an array of numbers: {error}") from None
    return _matrix(values, file)


def _read_npz(file: Path) -> Matrix:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise DataError(f"{file} is not an archive of arrays: {error}") from None
    return _matrix(_only(arrays, file), file)


def _read_safetensors(file: Path) -> Matrix:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise DataError(f"{file} is not a safetensors file of plain numbers: {error}") from None
    return _matrix(_only(tensors, file), file)


def _only(arrays: Mapping[str, Array], file: Path) -> Array:
    if len(arrays) != 1:
        raise DataError(f"{file} must hold one array; found {', '.join(arrays) or 'none'}")
    return next(iter(arrays.values()))


def _matrix(values: Array, file: Path) -> Matrix:
    if values.ndim != 2:
        raise DataError(f"{file} must be (queries, candidates); it has the shape {values.shape}")
    if values.dtype.name not in FLOATS:
        raise DataError(f"{file} holds {values.dtype}; save it as float32")
    return Matrix(values)


def _read_trec(file: Path) -> RankLists:
    """TREC run: `query Q0 candidate rank score tag` a line."""
    lists: dict[str, dict[str, float]] = {}
    for n, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split()
        try:
            query, _, candidate, _, score, *_ = parts
            value = float(score)
        except ValueError:
            raise DataError(
                f"{file}:{n} is not `query Q0 candidate rank score tag`: {line!r}"
            ) from None
        scores = lists.setdefault(query, {})
        if candidate in scores:
            raise DataError(f"{file}:{n}: candidate {candidate!r} stands twice for {query!r}")
        if abs(value) > _LARGEST:
            raise DataError(f"{file}:{n}: the score {score} is not a float32 number")
        scores[candidate] = value
    tied = sum(
        len(set(scores.values())) > len(np.unique(np.array(list(scores.values()), np.float32)))
        for scores in lists.values()
    )
    note = f"{file.name}: {tied} queries have scores that only tie as float32" if tied else ""
    return replace(_rank_lists(lists), note=note)


def _read_server_file(file: Path) -> RankLists | str | None:
    """CIRR test-server file: reciprocal ranks; None for JSON that is something else."""
    text = _text(file)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(values, dict) or not {"version", "metric"} <= values.keys():
        return None
    if values["metric"] != "recall":
        return f"metric {values['metric']!r} ranks a subset, not the gallery"
    values = parse_json(text, str(file))
    lists: dict[str, dict[str, float]] = {}
    for query, names in values.items():
        if query in ("version", "metric"):
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: query {query!r} must have a list of image names")
        lists[query] = {name: 1 / rank for rank, name in enumerate(names, 1)}
        if len(lists[query]) < len(names):
            raise DataError(f"{file}: query {query!r} names an image twice")
    return _rank_lists(lists)


def _rank_lists(lists: dict[str, dict[str, float]]) -> RankLists:
    named = dict.fromkeys(id for scores in lists.values() for id in scores)
    return RankLists(lists, tuple(lists), tuple(named))


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


_READERS: dict[str, Callable[[Path], Matrix | RankLists | str | None]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".json": _read_server_file,
    ".run": _read_trec,
    ".trec": _read_trec,
}
