"""The TileStore: features and similarity tiles of one data set under several sub-models.

Layout below the root:

    manifest.json                                what the store is (manifest.py)
    gallery.arrow, queries.arrow                 ids in hash order; queries with their labels
    features/MODEL/gallery/000012.DIGEST.arrow   one encode block
    features/MODEL/queries/000003.DIGEST.arrow
    scores/MODEL/00002-00000.DIGEST.arrow        one tile: query block - candidate block
    columns/shortlist/00002.DIGEST.arrow         candidates of each query, where a shortlist is kept
    moments/MODEL/00002.DIGEST.arrow             of its scores over the whole gallery
    banks/IDENTITY/sums.DIGEST.arrow             statistics of a query bank (fusion/bank.py)
    records/...DIGEST.json                       one per finished block, written after it
    quarantine/gallery-000012.json               images that could not be used, with reasons
    cut/MODEL-000003.json                        queries whose text is longer than it reads

Only a record makes a block exist. Its name carries the block's checksum, so a listing is enough to
know what is done, and every block is verified when a process first opens it.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from dafm_ray.config import Precision
from dafm_ray.datasets.base import Dataset, Query, digest, title_of
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.storage import Storage, open_storage
from dafm_ray.tiles import blocks
from dafm_ray.tiles.blocks import Array
from dafm_ray.tiles.manifest import Grid, Manifest, ModelEntry, ScoreType, library_versions

Role = Literal["gallery", "queries"]
ROLES: tuple[Role, ...] = ("gallery", "queries")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Failure:
    """An item that could not be used, and why."""

    role: Role
    id: str
    reason: str


def _reopen(uri: str, models: tuple[str, ...] | None, hidden: frozenset[int]) -> "TileStore":
    store = TileStore(uri) if models is None else TileStore(uri).of(models)
    return store.hiding(hidden)


def spans(size: int, step: int) -> list[range]:
    """Consecutive ranges of `step` that cover `size`; the last may be shorter."""
    return [range(start, min(start + step, size)) for start in range(0, size, step)]


class TileStore:
    """Reads and writes one store. Instances pickle as their URI."""

    def __init__(self, uri: str) -> None:
        """Open an existing store.

        Raises:
            DataError: there is none, or its manifest is damaged.
        """
        self.storage: Storage = open_storage(uri)
        self.uri = self.storage.uri
        self._verified: set[str] = set()
        self._only: tuple[str, ...] | None = None
        self.hidden: frozenset[int] = frozenset()
        try:
            data = self.storage.read("manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{self.uri} is not a tile store: it has no manifest.json") from None
        self.manifest = Manifest.from_bytes(data, f"{self.uri}/manifest.json")

    def __reduce__(self) -> tuple[Any, ...]:
        if self._only is not None or self.hidden:
            return _reopen, (self.uri, self._only, self.hidden)
        return type(self), (self.uri,)

    @classmethod
    def create(
        cls,
        uri: str,
        dataset: Dataset,
        spec: dict[str, Any],
        models: dict[str, ModelEntry],
        grid: Grid,
        score_type: ScoreType,
        shortlist: int = 0,
    ) -> "TileStore":
        """Create a store, or open one of the same data set and add models that are new to it.

        An existing store keeps its grid and score type, whatever is asked for.

        Args:
            uri: path or pyarrow filesystem URI.
            dataset: gallery and queries to store.
            spec: what opens the data set again.
            models: short name -> id and weights digest.
            grid: block shapes of a new store.
            score_type: of a new store.
            shortlist: see `Manifest`.

        Raises:
            ConfigError: a model name that is not a plain file name.
            DataError: the store was made for another gallery, other queries or other weights, or
                keeps other candidates of a query.
        """
        store = cls.find(uri, dataset, models, shortlist)
        if store is not None:
            store._restore_tables(dataset)
            store._set_models(models)
            return store
        storage = open_storage(uri)
        gallery, queries = dataset.gallery, dataset.queries
        tables = _tables(dataset)
        for name, data in tables.items():
            storage.write(name, data)
        manifest = Manifest(
            dataset=spec,
            protocol=dataset.protocol,
            policy=dataset.policy,
            gallery_size=len(gallery),
            gallery_digest=gallery.digest,
            queries_size=len(queries),
            queries_digest=dataset.queries_digest,
            score_type=score_type,
            grid=grid,
            tables={name: blocks.checksum(data) for name, data in tables.items()},
            models=models,
            shortlist=shortlist,
            versions=library_versions(),
        )
        storage.write("manifest.json", manifest.to_bytes())
        return cls(uri)

    @classmethod
    def find(
        cls, uri: str, dataset: Dataset, models: dict[str, ModelEntry], shortlist: int = 0
    ) -> "TileStore | None":
        """The store that `create` would go on with, as it lies there; None where it would make one.

        Writes nothing.

        Raises:
            ConfigError, DataError: see `create`.
        """
        for name in models:
            if not _MODEL_NAME.fullmatch(name):
                raise ConfigError(f"model name {name!r}: use letters, digits, '.', '_' and '-'")
        if not _exists(open_storage(uri), "manifest.json"):
            return None
        store = cls(uri)
        store._check_same(dataset)
        store._check_shortlist(shortlist, models)
        store.started(models)
        return store

    def _check_same(self, dataset: Dataset) -> None:
        mine = self.manifest
        # A folder is called by its path, which may change.
        split = "" if dataset.name == "folder" else dataset.split
        label = (dataset.protocol, dataset.policy, dataset.name, split)
        called = mine.dataset.get("name")
        stored_split = "" if called == "folder" else mine.dataset.get("split")
        kept = (mine.protocol, mine.policy, called, stored_split)
        if mine.dataset and kept != label:
            raise DataError(
                f"{self.uri} was made for {mine.title} under protocol {mine.protocol}, not for "
                f"{title_of(dataset.name, split, '')} under {dataset.protocol}; one store has one "
                "protocol. Choose another folder"
            )
        for what, stored, given in (
            ("gallery", mine.gallery_digest, dataset.gallery.digest),
            ("queries", mine.queries_digest, dataset.queries_digest),
        ):
            if stored != given:
                raise DataError(
                    f"{self.uri} was made for another {what} "
                    f"({mine.gallery_size} images, {mine.queries_size} queries; now "
                    f"{len(dataset.gallery)} and {len(dataset.queries)}). Choose another folder"
                )

    def _check_shortlist(self, shortlist: int, models: Collection[str]) -> None:
        kept = self.manifest.shortlist
        if kept != shortlist:
            held, asked = (
                f"the first {k} candidates of each model" if k else "the scores of all candidates"
                for k in (kept, shortlist)
            )
            raise DataError(f"{self.uri} keeps {held}, not {asked}; choose another folder")
        if kept and set(models) != set(self.manifest.models):
            raise DataError(
                f"{self.uri} keeps candidates of {', '.join(sorted(self.manifest.models))}; other "
                "models would find others. Choose another folder"
            )

    def _restore_tables(self, dataset: Dataset) -> None:
        """Write damaged or lost tables again, where the data set gives the same bytes."""
        for name, wanted in self.manifest.tables.items():
            if self._verify_one(name, wanted)[1]:
                data = _tables(dataset)[name]
                if blocks.checksum(data) == wanted:
                    self.storage.write(name, data)

    def started(self, models: dict[str, ModelEntry]) -> dict[str, ModelEntry]:
        """The store's own models with a finished block.

        Raises:
            DataError: one of `models` is among them with other weights.
        """
        started = {key.split("/")[1] for key in self._records}
        stored = {n: e for n, e in self.manifest.models.items() if n in started}
        for name in models.keys() & stored.keys():
            if stored[name].identity != models[name].identity:
                what = "scores or ids" if models[name].is_made_elsewhere else "weights"
                raise DataError(
                    f"{self.uri} holds model {name!r} with other {what} ({stored[name].id}); "
                    "give the new one another name, or choose another folder"
                )
        return stored

    def _set_models(self, models: dict[str, ModelEntry]) -> None:
        """Add models; those of an earlier run that never finished a block are dropped."""
        wanted = {**models, **self.started(models)}
        if self.manifest.models != wanted:
            self.manifest = replace(self.manifest, models=wanted)
            self.storage.write("manifest.json", self.manifest.to_bytes())

    def fix_encoding(self, model: str, batch: int, precision: Precision) -> None:
        """Say in the manifest how a model encodes, for every later run."""
        entry = replace(self.manifest.models[model], batch=batch, precision=precision)
        if entry != self.manifest.models[model]:
            self.manifest = replace(self.manifest, models={**self.manifest.models, model: entry})
            self.storage.write("manifest.json", self.manifest.to_bytes())

    # What is searched

    @cached_property
    def _gallery(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        return blocks.decode_gallery(self._read_table("gallery.arrow"))

    @property
    def gallery_ids(self) -> tuple[str, ...]:
        """(N,) ids in hash order."""
        return self._gallery[0]

    @property
    def source_order(self) -> tuple[int, ...]:
        """(N,) position of each candidate in the source, for audits."""
        return self._gallery[1]

    @cached_property
    def positions(self) -> dict[str, int]:
        """Gallery id -> position in hash order."""
        return {id: n for n, id in enumerate(self.gallery_ids)}

    @cached_property
    def queries(self) -> tuple[Query, ...]:
        """(Q,) queries in stored order; those in `hidden` without their targets."""
        stored = blocks.decode_queries(self._read_table("queries.arrow"))
        return tuple(
            replace(query, targets=()) if q in self.hidden else query
            for q, query in enumerate(stored)
        )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the sub-models, sorted."""
        return tuple(sorted(self.manifest.models)) if self._only is None else self._only

    def _twin(self) -> "TileStore":
        twin = TileStore.__new__(TileStore)
        twin.__dict__.update(self.__dict__)
        return twin

    def of(self, models: Iterable[str]) -> "TileStore":
        """The same store with some of its models only, as if it held no others.

        Raises:
            ConfigError: a model that is not in it.
        """
        part = self._twin()
        part._only = tuple(sorted(models))
        for name in part._only:
            if name not in self.models:
                raise ConfigError(
                    f"models: {self.uri} does not hold {name!r}; it holds {', '.join(self.models)}"
                )
        return part

    def hiding(self, queries: Iterable[int]) -> "TileStore":
        """The same store without the targets of some queries, by position: nothing can be learned
        from them, and no number counts them.
        """
        part = self._twin()
        part.__dict__.pop("queries", None)
        part.hidden = self.hidden | frozenset(int(q) for q in queries)
        return part

    def size(self, role: Role) -> int:
        """Number of candidates or of queries."""
        return self.manifest.gallery_size if role == "gallery" else self.manifest.queries_size

    # Blocks

    def feature_keys(self, model: str, role: Role) -> list[str]:
        """Keys of all encode blocks of a model, finished or not."""
        count = len(spans(self.size(role), self.manifest.grid.encode_block))
        return [feature_key(model, role, block) for block in range(count)]

    def score_keys(self, model: str) -> list[str]:
        """Keys of all similarity tiles of a model, finished or not."""
        across = self._tiles_across
        return [score_key(model, q, n) for q in range(len(self.tile_rows)) for n in across]

    @property
    def _tiles_across(self) -> range:
        """Tiles that hold the scores of one query."""
        return range(1 if self.manifest.shortlist else len(self.tile_columns))

    @property
    def width(self) -> int:
        """Scores of a query under one model, at most."""
        kept = self.manifest.shortlist * len(self.manifest.models)
        return kept + 1 if kept else self.manifest.gallery_size

    @property
    def tile_rows(self) -> list[range]:
        """Query ranges of the tile grid."""
        return spans(self.manifest.queries_size, self.manifest.grid.tile_queries)

    @property
    def tile_columns(self) -> list[range]:
        """Candidate ranges of the tile grid; a shortlist is searched in these."""
        return spans(self.manifest.gallery_size, self.manifest.grid.tile_candidates)

    @cached_property
    def _records(self) -> dict[str, str]:
        """Key -> digest of every finished block, from one listing."""
        found: dict[str, str] = {}
        for path in self._record_paths():
            found.setdefault(*_parse_record(path))
        return found

    @property
    def scores_digest(self) -> str:
        """Of the queries, the gallery and every finished tile of the models."""
        done = self._records
        keys = [key for model in self.models for key in self.score_keys(model)]
        if self.manifest.shortlist:
            keys += [columns_key(q) for q in range(len(self.tile_rows))]
        tiles = [f"{key} {done[key]}" for key in keys if key in done]
        return digest([self.manifest.queries_digest, self.manifest.gallery_digest, *tiles])

    def _record_paths(self) -> list[str]:
        return [path for path in self.storage.list("records") if _RECORD.fullmatch(path)]

    def finished(self) -> set[str]:
        """Keys of all finished blocks, listed anew."""
        self.__dict__.pop("_records", None)
        return set(self._records)

    def write(self, key: str, values: Array) -> None:
        """Commit one block: first its bytes, then its record."""
        data = blocks.encode_array(values)
        digest = blocks.checksum(data)
        self.storage.write(f"{key}.{digest}.arrow", data)
        record = json.dumps({"key": key, "digest": digest, "bytes": data.size}).encode()
        self.storage.write(f"records/{key}.{digest}.json", pa.py_buffer(record))

    def read(self, key: str) -> Array:
        """One block, verified at its first open in this process; a view into the local file.

        Raises:
            DataError: not finished, missing, or damaged.
        """
        if key not in self._records:
            self.finished()
        digest = self._records.get(key)
        if digest is None:
            raise DataError(
                f"{self.uri}: {key} is not there yet; run `dafm precompute` "
                "(or `dafm tiles ingest`) to the end first"
            )
        path = f"{key}.{digest}.arrow"
        try:
            data = self.storage.read_fixed(path, lambda data: blocks.checksum(data) == digest)
        except FileNotFoundError:
            raise DataError(f"{self.uri}: {path} is missing; {_MEND}") from None
        if path not in self._verified:
            if blocks.checksum(data) != digest:
                raise DataError(f"{self.uri}: {path} is damaged; {_MEND}")
            self._verified.add(path)
        return blocks.decode_array(data)

    def features(self, model: str, role: Role, rows: range) -> Array:
        """(len(rows), ...) features of consecutive items."""
        step = self.manifest.grid.encode_block
        first, last = rows.start // step, (rows.stop - 1) // step
        parts = [self.read(feature_key(model, role, block)) for block in range(first, last + 1)]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined[rows.start - first * step : rows.stop - first * step]

    def scores(self, model: str, query_block: int, rows: slice | Array = slice(None)) -> Array:
        """(B, N) scores of one row of tiles; a slice of tiles that span the gallery is no copy.

        Of a shortlist (B, W): those of the candidates of `shortlist`.

        Args:
            model: short name.
            query_block: which row of tiles.
            rows: of the tiles; all by default.
        """
        parts = [self.read(score_key(model, query_block, n))[rows] for n in self._tiles_across]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    # Shortlists

    def shortlist(self, query_block: int) -> Array:
        """(B, W) int64 positions of the candidates that one row of tiles keeps of each query:
        ascending, then -1. The last column holds no candidate.
        """
        return self.read(columns_key(query_block))

    def moments(self, model: str) -> Array:
        """(Q, 4) float64 mean, standard deviation, lowest and highest of each query's scores over
        the whole gallery, where only a shortlist of them is kept.
        """
        return np.concatenate(
            [self.read(moments_key(model, q)) for q in range(len(self.tile_rows))]
        )

    # Query banks

    def bank(self, identity: str) -> Array | None:
        """The statistics of a query bank, if they are kept here and sound."""
        try:
            return self.read(bank_key(identity))
        except DataError:
            return None

    def keep_bank(self, identity: str, statistics: Array) -> None:
        """Keep the statistics of a query bank beside the tiles; a store that cannot be written is
        used without.
        """
        with suppress(MachineError):
            self.write(bank_key(identity), statistics)

    # Failures

    def quarantine(self, role: Role, block: int, failures: Sequence[Failure]) -> None:
        """List the items of one encode block that could not be used."""
        rows = [{"id": failure.id, "reason": failure.reason} for failure in failures]
        data = json.dumps(rows, ensure_ascii=False, indent=1).encode()
        self.storage.write(_quarantine_path(role, block), pa.py_buffer(data))

    def failures(self) -> list[Failure]:
        """All items that could not be used, candidates first."""
        found: list[Failure] = []
        for path in self.storage.list("quarantine"):
            role: Role = "gallery" if "/gallery-" in path else "queries"
            try:
                rows = json.loads(bytes(memoryview(self.storage.read(path))))
                found.extend(Failure(role, row["id"], row["reason"]) for row in rows)
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.uri}: {path} is damaged; delete it") from None
        return found

    def list_cut(self, model: str, block: int, queries: Sequence[str]) -> None:
        """List the queries of one encode block whose text is longer than a model reads."""
        data = json.dumps(list(queries), ensure_ascii=False, indent=1).encode()
        self.storage.write(f"cut/{model}-{block:06d}.json", pa.py_buffer(data))

    def cut_texts(self) -> dict[str, list[str]]:
        """Model -> queries whose text is longer than it reads; models that read all are left out.

        Raises:
            DataError: a list is damaged.
        """
        found: dict[str, list[str]] = {}
        for path in sorted(self.storage.list("cut")):
            model = path.removeprefix("cut/").rpartition("-")[0]
            try:
                found.setdefault(model, []).extend(
                    json.loads(bytes(memoryview(self.storage.read(path))))
                )
            except (ValueError, TypeError):
                raise DataError(f"{self.uri}: {path} is damaged; delete it") from None
        return {model: found[model] for model in self.models if model in found}

    def forget(self, role: Role, block: int) -> None:
        """Drop the records of an encode block, of every tile made of it, and its quarantine."""
        rows = spans(self.size(role), self.manifest.grid.encode_block)[block]
        tiles = self.tile_rows if role == "queries" else self.tile_columns
        touched = {
            n for n, tile in enumerate(tiles) if tile.start < rows.stop and rows.start < tile.stop
        }
        listed = bool(self.manifest.shortlist)
        for path in self._record_paths():
            kind, model, *place = _parse_record(path)[0].split("/")
            if kind == "banks" or (kind != "features" and listed and role == "gallery"):
                stale = True
            elif kind == "features":
                stale = path.startswith(f"records/{feature_key(model, role, block)}.")
            else:
                q, _, n = place[0].partition("-")
                stale = int(q if role == "queries" else n) in touched
            if stale:
                self.storage.delete(path)
        # Last, so that a run stopped in between forgets the block again.
        self.storage.delete(_quarantine_path(role, block))
        self.finished()

    def repair(self, models: Collection[str] | None = None) -> list[str]:
        """Drop every block that is damaged or missing, so that `precompute` makes it again.

        Args:
            models: whose blocks; all by default.

        Returns:
            Paths of what was dropped.
        """
        unsound = {path for path, problem in self.verify(models) if problem}
        dropped: list[str] = []
        for path in self._record_paths():
            key, digest = _parse_record(path)
            data = f"{key}.{digest}.arrow"
            if path in unsound or data in unsound:
                self.storage.delete(path)
                self.storage.delete(data)
                dropped.append(data)
        self.finished()
        return dropped

    # Checks

    def missing(self, models: Iterable[str] | None = None) -> list[str]:
        """Keys of the tiles that are not finished, of some or of all models."""
        done = self.finished()
        names = self.models if models is None else models
        return [key for name in names for key in self.score_keys(name) if key not in done]

    def refuse_incomplete(self) -> None:
        """DataError if a tile is not finished."""
        missing = self.missing()
        if missing:
            raise DataError(
                f"{self.uri} lacks {len(missing)} tiles (first: {missing[0]}); "
                "run `dafm precompute` (or `dafm tiles ingest`) to the end first"
            )

    def refuse_shortlist(self, what: str) -> None:
        """ConfigError if the store does not hold the scores of all candidates.

        Args:
            what: needs them, as the beginning of a sentence.
        """
        if self.manifest.shortlist:
            raise ConfigError(
                f"{what} needs the scores of all candidates, and {self.uri} keeps a shortlist of "
                "each query; use a store without `shortlist` (docs/scale.md)"
            )

    def verify(self, models: Collection[str] | None = None) -> Iterator[tuple[str, str]]:
        """Check every record and every checksum, of some or of all models.

        Yields:
            (path, problem), "" where all is well.
        """
        for name in self.manifest.tables:
            yield self._verify_one(name, self.manifest.tables[name])
        for path in self._record_paths():
            key, digest = _parse_record(path)
            if not _is_of(key, models):
                continue
            try:
                record = json.loads(bytes(memoryview(self.storage.read(path))))
                sound = record["key"] == key and record["digest"] == digest
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                yield path, "the record is damaged"
            yield self._verify_one(f"{key}.{digest}.arrow", digest)

    def _verify_one(self, path: str, digest: str) -> tuple[str, str]:
        try:
            data = self.storage.read(path)
        except FileNotFoundError:
            return path, "missing"
        return path, "" if blocks.checksum(data) == digest else "damaged"

    def _read_table(self, name: str) -> pa.Buffer:
        path, problem = self._verify_one(name, self.manifest.tables[name])
        if problem:
            raise DataError(f"{self.uri}: {path} is {problem}; restore it from a copy")
        return self.storage.read(path)


_MEND = (
    "run `dafm tiles verify --repair` on the store, then `dafm precompute` "
    "(or `dafm tiles ingest`) again"
)
_RECORD = re.compile(r"records/(.+)\.([0-9a-f]{32})\.json")


def _parse_record(path: str) -> tuple[str, str]:
    """(key, digest) of a record's path."""
    matched = _RECORD.fullmatch(path)
    assert matched is not None
    return matched[1], matched[2]


def _is_of(key: str, models: Collection[str] | None) -> bool:
    """Whether a block belongs to one of the models; None stands for all."""
    return models is None or key.split("/")[1] in models


def _quarantine_path(role: Role, block: int) -> str:
    return f"quarantine/{role}-{block:06d}.json"


def _tables(dataset: Dataset) -> dict[str, pa.Buffer]:
    gallery = dataset.gallery
    return {
        "gallery.arrow": blocks.encode_gallery(gallery.ids, gallery.source_order),
        "queries.arrow": blocks.encode_queries(dataset.queries),
    }


def feature_key(model: str, role: Role, block: int) -> str:
    """Key of one encode block."""
    return f"features/{model}/{role}/{block:06d}"


def score_key(model: str, query_block: int, candidate_block: int) -> str:
    """Key of one similarity tile."""
    return f"scores/{model}/{query_block:05d}-{candidate_block:05d}"


def columns_key(query_block: int) -> str:
    """Key of the candidates that a query block keeps."""
    return f"columns/shortlist/{query_block:05d}"


def moments_key(model: str, query_block: int) -> str:
    """Key of the moments of a query block's scores over the whole gallery."""
    return f"moments/{model}/{query_block:05d}"


def bank_key(identity: str) -> str:
    """Key of a query bank's statistics."""
    return f"banks/{identity}/sums"


def _exists(storage: Storage, path: str) -> bool:
    try:
        storage.read(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
