"""Scores made elsewhere become a store: a score folder, or the Parquet form of `tiles export`.

A score folder holds

    scores.json        {"dataset", "split", "protocol", "reference": "mask" | "keep", "category"}
    queries.json       [{"id", "reference", "targets", "captions", "group", "fold_group", ...}]
    query_ids.json     order of the rows, gallery_ids.json: order of the columns
    MODEL.npy          (or .npz, .safetensors) float16 or float32; NaN: not scored
    MODEL.json         (or .json.gz) a CIRR server file, .run or .trec: a TREC run

Everything is aligned by id, never by position. Where a data set with annotations is named instead,
its queries and gallery are taken and the folder needs only the systems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dafm_ray.config import DatasetConfig, PrecomputeConfig, parse_config
from dafm_ray.datasets.annotations import read_json, read_queries, take, texts
from dafm_ray.datasets.base import (
    PROTOCOLS,
    Dataset,
    Draft,
    Query,
    ReferencePolicy,
    exclude_reference,
    refuse_duplicates,
)
from dafm_ray.datasets.images import NoImages
from dafm_ray.datasets.registry import read_dataset
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.progress import progress
from dafm_ray.tiles.blocks import Array
from dafm_ray.tiles.export import read_export
from dafm_ray.tiles.foreign import FLOATS, ForeignScores, file_digest, read_systems
from dafm_ray.tiles.lease import writing
from dafm_ray.tiles.manifest import MADE_ELSEWHERE, Grid, ModelEntry, ScoreType
from dafm_ray.tiles.storage import Storage, open_storage
from dafm_ray.tiles.store import TileStore, score_key

NAMED = 5
"""Ids that a message about ids names at most."""


@dataclass(frozen=True)
class ScoresConfig:
    """`scores.json`: which protocol the scores were made for.

    Attributes:
        dataset: name, printed with every number.
        split: of the data set.
        protocol: which numbers are counted.
        reference: `mask` takes a query's reference out of its ranking.
        category: of all queries, if they do not name their own.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    dataset: str
    split: str
    protocol: str
    reference: Literal["mask", "keep"]
    category: str = ""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(unknown("protocol", self.protocol, PROTOCOLS))
        prescribed = PROTOCOLS[self.protocol]
        if prescribed not in (None, self.reference):
            raise ConfigError(
                f"protocol {self.protocol!r} has the reference {prescribed!r}, "
                f"scores.json says {self.reference!r}; one number means one protocol"
            )


@dataclass(frozen=True)
class Coverage:
    """What a system scored: queries without any candidate, and share of pairs without a score."""

    model: str
    dtype: str
    empty_queries: int
    missing: float


@dataclass(frozen=True)
class Ingested:
    """A filled store, what its systems cover, and what a user should know about the files."""

    store: TileStore
    coverage: list[Coverage]
    notes: list[str]


@dataclass(frozen=True)
class _System:
    """A system and where its rows and columns stand in the store's order."""

    scores: ForeignScores
    entry: ModelEntry
    rows: Sequence[int]
    columns: Array


def ingest(source: str, out: str, dataset: DatasetConfig | None = None) -> Ingested:
    """Write the scores of a folder or of an exported file to a store; resumes by itself.

    Args:
        source: score folder, or a Parquet file of `tiles export`.
        out: folder or URI of the store; one of the same data set receives further models.
        dataset: read queries and gallery from its annotations instead of the folder.

    Raises:
        ConfigError: `scores.json` is wrong.
        DataError: ids do not align, a score is infinite, a file cannot be read, or the store was
            made for another data set.
        MachineError: another run holds the store, or the disk refuses.
    """
    path = Path(source)
    if path.is_file():
        exported = read_export(path)
        opened, spec = exported.draft.dataset(), exported.spec
        notes: list[str] = []
        systems = {
            name: _aligned(scores, opened, entry, None, None, path)
            for name, (scores, entry) in exported.systems.items()
        }
    elif path.is_dir():
        draft, spec = _searched(path, dataset)
        opened = draft.dataset()
        systems, notes = _systems(path, opened)
    else:
        raise DataError(f"there is no score folder or exported file {source}")
    score_type: ScoreType = (
        "float16" if all(s.scores.dtype == "float16" for s in systems.values()) else "float32"
    )
    storage = open_storage(out)
    with writing(storage):
        _refuse_narrower(storage, score_type)
        store = TileStore.create(
            out,
            opened,
            spec,
            {name: system.entry for name, system in systems.items()},
            Grid(
                PrecomputeConfig.encode_block,
                PrecomputeConfig.tile_queries,
                PrecomputeConfig.tile_candidates,
            ),
            score_type,
        )
        coverage = _write(store, systems)
    return Ingested(store, coverage, notes)


def _refuse_narrower(storage: Storage, score_type: ScoreType) -> None:
    """DataError if a store is there already and would round the scores."""
    try:
        kept = TileStore(storage.uri).manifest.score_type
    except DataError:
        return  # there is none, or `create` says what is wrong with it
    if FLOATS.index(kept) > FLOATS.index(score_type):
        raise DataError(
            f"{storage.uri} keeps {kept}, which would make ties of {score_type} scores; "
            "choose another folder"
        )


def _searched(folder: Path, dataset: DatasetConfig | None) -> tuple[Draft, dict[str, Any]]:
    """What the scores are about, and what opens it again."""
    if dataset is not None:
        return read_dataset(dataset), asdict(dataset)
    if not (folder / "scores.json").is_file():
        raise DataError(
            f"{folder} holds no scores.json; write one, or name a data set whose annotations say "
            "what the scores are about"
        )
    config = parse_config(
        ScoresConfig, read_json(folder / "scores.json", dict), str(folder / "scores.json")
    )
    file = folder / "queries.json"
    queries, problems = read_queries(
        ((f"{file}, entry {n}", entry) for n, entry in enumerate(read_json(file, list))),
        lambda entry, where: _query(entry, where, config),
    )
    ids = _read_ids(folder / "gallery_ids.json")
    named = {id for q in queries for id in (q.reference, *q.targets, *q.excluded, *q.group)}
    _refuse_strangers(sorted(named), ids, f"{file} names image", "gallery_ids.json")
    draft = Draft(
        name=config.dataset,
        split=config.split,
        protocol=config.protocol,
        policy=config.reference,
        images=tuple((id, "") for id in ids),
        queries=queries,
        source=NoImages(),
        category=config.category,
        problems=problems,
    )
    opened = DatasetConfig(config.dataset, config.split, category=config.category)
    return draft, asdict(opened)


def _query(entry: Any, where: str, config: ScoresConfig) -> Query:
    reference = take(entry, "reference", str, where)
    policy: ReferencePolicy = config.reference
    also = texts(entry.get("excluded") or [], "excluded", where)
    excluded = dict.fromkeys((*exclude_reference(reference, policy), *also))
    id = entry.get("id")
    return Query(
        id=str(id) if isinstance(id, int) else take(entry, "id", str, where),
        reference=reference,
        captions=texts(entry.get("captions") or [], "captions", where),
        targets=texts(entry.get("targets") or [], "targets", where),
        excluded=tuple(excluded),
        group=texts(entry.get("group") or [], "group", where),
        fold_group=str(entry.get("fold_group") or ""),
        category=str(entry.get("category") or config.category),
    )


def _read_ids(file: Path) -> list[str]:
    """A list of ids; numbers are taken as text."""
    values = read_json(file, list)
    if not all(isinstance(value, str | int) for value in values):
        raise DataError(f"{file} must be a list of ids")
    ids = [str(value) for value in values]
    refuse_duplicates(ids, f"{file}: id")
    return ids


def _systems(folder: Path, dataset: Dataset) -> tuple[dict[str, _System], list[str]]:
    found, notes = read_systems(folder)
    if not found:
        raise DataError(f"{folder} holds no scores: no .npy, .safetensors, run or server file")
    dense = any(scores.shape() for scores, _ in found.values())
    query_ids = _read_ids(folder / "query_ids.json") if dense else None
    gallery_ids = _read_ids(folder / "gallery_ids.json") if dense else None
    systems = {
        name: _aligned(
            scores,
            dataset,
            ModelEntry(f"{MADE_ELSEWHERE}:{name}@{file.name}", file_digest(file)),
            query_ids,
            gallery_ids,
            file,
        )
        for name, (scores, file) in found.items()
    }
    return systems, notes


def _aligned(
    scores: ForeignScores,
    dataset: Dataset,
    entry: ModelEntry,
    query_ids: Sequence[str] | None,
    gallery_ids: Sequence[str] | None,
    file: Path,
) -> _System:
    """Find the store's rows and columns in a system's, by id."""
    rows = scores.query_ids if scores.query_ids is not None else query_ids
    columns = scores.gallery_ids if scores.gallery_ids is not None else gallery_ids
    assert rows is not None
    assert columns is not None
    shape = scores.shape()
    if shape is not None and shape != (len(rows), len(columns)):
        raise DataError(
            f"{file} is {shape[0]} x {shape[1]}, but query_ids.json names {len(rows)} queries and "
            f"gallery_ids.json {len(columns)} candidates"
        )
    queries = [query.id for query in dataset.queries]
    _refuse_strangers(rows, queries, f"{file}: query", "the queries")
    _refuse_strangers(queries, rows, f"{file} lacks query", "it")
    _refuse_strangers(columns, dataset.gallery.ids, f"{file}: candidate", "the gallery")
    if shape is not None:
        _refuse_strangers(dataset.gallery.ids, columns, f"{file} lacks candidate", "it")
    row_of = {id: n for n, id in enumerate(rows)}
    column_of = {id: n for n, id in enumerate(columns)}
    places = np.array([column_of.get(id, -1) for id in dataset.gallery.ids])
    return _System(scores, entry, [row_of[id] for id in queries], places)


def _refuse_strangers(given: Sequence[str], known: Sequence[str], what: str, where: str) -> None:
    """DataError that names the first ids that are not known."""
    strangers = sorted(set(given) - set(known))
    if strangers:
        named = ", ".join(map(repr, strangers[:NAMED]))
        more = f" and {len(strangers) - NAMED} more" if len(strangers) > NAMED else ""
        raise DataError(f"{what} {named}{more}: not in {where}; ids are compared as written")


def _write(store: TileStore, systems: Mapping[str, _System]) -> list[Coverage]:
    total = sum(len(store.score_keys(name)) for name in systems)
    coverage: list[Coverage] = []
    with progress("ingest", total, unit="tile") as shown:
        for name, system in systems.items():
            done = store.finished()
            empty, missing = 0, 0
            for q, rows in enumerate(store.tile_rows):
                block = _in_order(store, name, system, rows)
                absent = np.isnan(block)
                empty += int(absent.all(axis=1).sum())
                missing += int(absent.sum())
                for n, columns in enumerate(store.tile_columns):
                    if score_key(name, q, n) not in done:
                        tile = block[:, columns.start : columns.stop]
                        store.write(score_key(name, q, n), tile)
                    shown.advance()
            size = store.size("queries") * store.size("gallery")
            coverage.append(Coverage(name, system.scores.dtype, empty, missing / size))
    return coverage


def _in_order(store: TileStore, name: str, system: _System, rows: range) -> Array:
    """(B, N) scores of some queries in the store's order and type."""
    given = system.scores.rows([system.rows[row] for row in rows])
    for r, n in np.argwhere(np.isinf(given))[:1]:
        raise DataError(
            f"{name}: the score of query {store.queries[rows[int(r)]].id!r} is infinite (column "
            f"{int(n)}); write NaN for a candidate that was not scored"
        )
    block = np.full((len(rows), len(system.columns)), np.nan, dtype=store.manifest.score_type)
    present = system.columns >= 0
    block[:, present] = given[:, system.columns[present]]
    return block
