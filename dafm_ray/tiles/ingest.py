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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from dafm_ray.config import DatasetConfig, PrecomputeConfig, parse_config
from dafm_ray.datasets.annotations import place_of, read_json, read_queries, take, texts
from dafm_ray.datasets.base import (
    PROTOCOLS,
    Dataset,
    Draft,
    Query,
    ReferencePolicy,
    exclude_reference,
    refuse_duplicates,
)
from dafm_ray.datasets.registry import read_dataset
from dafm_ray.datasets.sources import NoImages
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.lease import writing
from dafm_ray.progress import progress
from dafm_ray.storage import Storage, open_storage
from dafm_ray.tiles.blocks import Array, ScoresDigest
from dafm_ray.tiles.export import read_export
from dafm_ray.tiles.foreign import FLOATS, ForeignScores, read_systems
from dafm_ray.tiles.manifest import MADE_ELSEWHERE, Grid, ModelEntry, ScoreType
from dafm_ray.tiles.store import TileStore, score_key, spans

Q_ROWS = PrecomputeConfig.tile_queries
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
        if dataset is not None:
            raise ConfigError(f"{source} says itself what it is about; leave the data set out")
        exported = read_export(path)
        opened, spec = exported.draft.dataset(), exported.spec
        notes: list[str] = []
        systems = {
            name: _aligned(scores, opened, None, None, path)
            for name, scores in exported.systems.items()
        }
        entries, written = exported.entries, exported.digests
    elif path.is_dir():
        draft, spec = _searched(path, dataset)
        opened, written = draft.dataset(), {}
        systems, files, notes = _systems(path, opened)
        entries = {
            name: ModelEntry(f"{MADE_ELSEWHERE}:{name}@{files[name].name}", "") for name in systems
        }
    else:
        raise DataError(f"there is no score folder or exported file {source}")
    score_type: ScoreType = (
        "float16" if all(s.scores.dtype == "float16" for s in systems.values()) else "float32"
    )
    storage = open_storage(out)
    with writing(storage):
        _refuse_narrower(storage, score_type)
        digests, coverage = _survey(opened, systems)
        for name in written:
            if written[name] != digests[name]:
                raise DataError(f"{source}: the scores of {name} have changed since the export")
        for name, entry in entries.items():
            if not entry.weights_digest:
                entries[name] = replace(entry, weights_digest=digests[name])
        store = TileStore.create(
            out,
            opened,
            spec,
            entries,
            Grid(PrecomputeConfig.encode_block, Q_ROWS, PrecomputeConfig.tile_candidates),
            score_type,
        )
        store.repair(systems)
        _write(store, opened, systems)
    return Ingested(store, coverage, notes)


def _survey(
    dataset: Dataset, systems: Mapping[str, _System]
) -> tuple[dict[str, str], list[Coverage]]:
    """Digest of each system's scores as they are aligned (other ids are other scores), and what it
    covers.

    Raises:
        DataError: a score is infinite.
    """
    digests: dict[str, str] = {}
    coverage: list[Coverage] = []
    blocks = spans(len(dataset.queries), Q_ROWS)
    with progress("read", len(systems) * len(blocks), unit="block") as shown:
        for name, system in systems.items():
            digest, empty, missing = ScoresDigest(), 0, 0
            for rows in blocks:
                block = _in_order(dataset, name, system, rows)
                digest.update(block)
                absent = np.isnan(block)
                empty += int(absent.all(axis=1).sum())
                missing += int(absent.sum())
                shown.advance()
            digests[name] = digest.hex()
            pairs = len(dataset.queries) * len(dataset.gallery)
            coverage.append(Coverage(name, system.scores.dtype, empty, missing / pairs))
    return digests, coverage


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
    storage = open_storage(str(folder))
    config = parse_config(
        ScoresConfig, read_json(storage, "scores.json", dict), place_of(storage, "scores.json")
    )
    file = place_of(storage, "queries.json")
    entries = enumerate(read_json(storage, "queries.json", list))
    queries, problems = read_queries(
        ((f"{file}, entry {n}", entry) for n, entry in entries),
        lambda entry, where: _query(entry, where, config),
    )
    ids = _read_ids(storage, "gallery_ids.json")
    named = {id for q in queries for id in (q.reference, *q.targets, *q.excluded, *q.group)}
    _refuse_strangers(sorted(named), ids, f"{file}: gallery_ids.json does not hold")
    categories = {query.category for query in queries}
    if config.protocol.startswith("fashioniq") and len(categories) > 1:
        raise DataError(
            f"{file} holds queries of {len(categories)} categories, and {config.protocol} has one "
            "gallery a category; write a score folder for each and evaluate the stores together"
        )
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


_KEYS = ("id", "reference", "targets", "captions", "group", "fold_group", "category", "excluded")


def _query(entry: Any, where: str, config: ScoresConfig) -> Query:
    if isinstance(entry, dict):
        for key in entry.keys() - set(_KEYS):
            raise DataError(f"{where}: {unknown('key', key, _KEYS)}")
    reference = take(entry, "reference", str, where)
    policy: ReferencePolicy = config.reference
    captions, targets, group, also = (
        texts([] if entry.get(key) is None else entry[key], key, where)
        for key in ("captions", "targets", "group", "excluded")
    )
    for key in ("fold_group", "category"):
        if not isinstance(entry.get(key), str | None):
            raise DataError(f"{where}: {key!r} must be text, found {entry[key]!r}")
    category = entry.get("category") or config.category
    if config.category not in ("", category):
        raise DataError(f"{where}: category {category!r}, but scores.json says {config.category!r}")
    if policy == "mask" and reference in targets:
        raise DataError(f"{where}: a target is the reference, which is never ranked")
    if policy == "keep" and reference in also:
        raise DataError(f"{where}: the reference is excluded, but scores.json says it is kept")
    if set(also) & set(targets):
        raise DataError(f"{where}: a target is excluded, so that it is never ranked")
    if group and reference not in group:
        raise DataError(f"{where}: the group does not hold the reference")
    id = entry.get("id")
    return Query(
        id=str(id) if type(id) is int else take(entry, "id", str, where),
        reference=reference,
        captions=captions,
        targets=targets,
        excluded=tuple(dict.fromkeys((*exclude_reference(reference, policy), *also))),
        group=group,
        fold_group=entry.get("fold_group") or reference,
        category=category,
    )


def _read_ids(folder: Storage, file: str) -> list[str]:
    """A list of ids; numbers are taken as text."""
    values, where = read_json(folder, file, list), place_of(folder, file)
    if not all(type(value) is int or isinstance(value, str) for value in values):
        raise DataError(f"{where} must be a list of ids")
    ids = [str(value) for value in values]
    refuse_duplicates(ids, f"{where}: id")
    return ids


def _systems(
    folder: Path, dataset: Dataset
) -> tuple[dict[str, _System], dict[str, Path], list[str]]:
    found, notes = read_systems(folder)
    if not found:
        raise DataError(f"{folder} holds no scores: no .npy, .safetensors, run or server file")
    dense = any(scores.shape() for scores, _ in found.values())
    storage = open_storage(str(folder))
    query_ids = _read_ids(storage, "query_ids.json") if dense else None
    gallery_ids = _read_ids(storage, "gallery_ids.json") if dense else None
    systems = {
        name: _aligned(scores, dataset, query_ids, gallery_ids, file)
        for name, (scores, file) in found.items()
    }
    return systems, {name: file for name, (_, file) in found.items()}, notes


def _aligned(
    scores: ForeignScores,
    dataset: Dataset,
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
    queries, gallery = [query.id for query in dataset.queries], dataset.gallery.ids
    _refuse_strangers(rows, queries, f"{file}: the queries do not hold")
    _refuse_strangers(queries, rows, f"{file} has no scores of the queries")
    _refuse_strangers(columns, gallery, f"{file}: the gallery does not hold")
    if shape is not None:
        _refuse_strangers(gallery, columns, f"{file} has no scores of the candidates")
    row_of = {id: n for n, id in enumerate(rows)}
    column_of = {id: n for n, id in enumerate(columns)}
    places = np.array([column_of.get(id, -1) for id in gallery])
    return _System(scores, [row_of[id] for id in queries], places)


def _refuse_strangers(given: Sequence[str], known: Sequence[str], what: str) -> None:
    """DataError that names the first ids that are not known."""
    strangers = sorted(set(given) - set(known))
    if strangers:
        named = ", ".join(map(repr, strangers[:NAMED]))
        more = f" and {len(strangers) - NAMED} more" if len(strangers) > NAMED else ""
        raise DataError(f"{what} {named}{more}; ids are compared as written")


def _write(store: TileStore, dataset: Dataset, systems: Mapping[str, _System]) -> None:
    """Write the tiles that are not there yet."""
    total = sum(len(store.score_keys(name)) for name in systems)
    todo = set(store.missing(systems))
    with progress("ingest", total, total - len(todo), unit="tile") as shown:
        for name, system in systems.items():
            for q, rows in enumerate(store.tile_rows):
                keys = [score_key(name, q, n) for n in range(len(store.tile_columns))]
                if todo.isdisjoint(keys):
                    continue
                block = _in_order(dataset, name, system, rows).astype(store.manifest.score_type)
                for key, columns in zip(keys, store.tile_columns, strict=True):
                    if key in todo:
                        store.write(key, block[:, columns.start : columns.stop])
                        shown.advance()


def _in_order(dataset: Dataset, name: str, system: _System, rows: range) -> Array:
    """(B, N) scores of some queries in the store's order, in the file's type."""
    given = system.scores.rows([system.rows[row] for row in rows])
    block = np.full((len(rows), len(system.columns)), np.nan, dtype=system.scores.dtype)
    present = system.columns >= 0
    block[:, present] = given[:, system.columns[present]]
    for r, n in np.argwhere(np.isinf(block))[:1]:
        raise DataError(
            f"{name}: the score of query {dataset.queries[rows[int(r)]].id!r} and candidate "
            f"{dataset.gallery.ids[int(n)]!r} is infinite; write NaN for a candidate that was not "
            "scored"
        )
    return block
