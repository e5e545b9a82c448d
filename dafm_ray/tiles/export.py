"""The exchange form of a store: one Parquet file, a row a query.

Columns: the fields of a query (id, reference, captions, targets, ...), and for each model
`scores.MODEL`: the scores of all candidates as one fixed-size binary value, little-endian. The
file's metadata (key `dafm_ray`, JSON) names candidates, type, protocol and models. Fixed-size
binary reads and writes many times faster than lists of numbers.

In pandas: `np.frombuffer(row, dtype)` gives the scores of a query in the order of `gallery_ids`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.datasets.base import Draft, Query, digest
from dafm_ray.datasets.sources import NoImages
from dafm_ray.errors import DataError
from dafm_ray.files import replacing
from dafm_ray.progress import progress
from dafm_ray.tiles import blocks
from dafm_ray.tiles.blocks import Array
from dafm_ray.tiles.manifest import ModelEntry
from dafm_ray.tiles.store import TileStore

METADATA = b"dafm_ray"
DIGESTS = "dafm_ray.digests"
"""Of the scores of each model, and of everything else."""
FORMAT = 2
_PREFIX = "scores."
_GROUP_BYTES = 64_000_000


def export(store: TileStore, to: str) -> None:
    """Write all models of a store to a Parquet file.

    Raises:
        ConfigError: the store keeps shortlists.
        DataError: the store is incomplete or damaged.
        MachineError: the file cannot be written.
    """
    store.refuse_shortlist("An export")
    store.refuse_incomplete()
    schema = _schema(store)
    row_bytes = len(store.models) * store.size("gallery") * np.dtype(_type(store)).itemsize
    step = max(1, _GROUP_BYTES // row_bytes)
    digests = {model: blocks.ScoresDigest() for model in store.models}
    plain = [field.name for field in schema if not field.name.startswith(_PREFIX)]
    with (
        replacing(Path(to)) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression="NONE", use_dictionary=plain, write_statistics=plain
        ) as writer,
        progress("export", store.size("queries"), unit="query") as shown,
    ):
        for block, rows in enumerate(store.tile_rows):
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                labels = blocks.queries_batch(store.queries[part.start : part.stop])
                scores = []
                for model in store.models:
                    found = store.scores(model, block, slice(start, start + step))
                    digests[model].update(found)
                    scores.append(_binary(found))
                columns = [*labels.columns, *scores]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                shown.advance(len(part))
        written = {
            "scores": {model: found.hex() for model, found in digests.items()},
            "labels": _labels_digest(schema.metadata[METADATA], store.queries),
        }
        writer.add_key_value_metadata({DIGESTS: json.dumps(written)})


def _labels_digest(about: bytes, queries: Sequence[Query]) -> str:
    """Digest of the metadata and of the queries, in whatever order they stand."""
    return digest([about.decode(), *sorted(repr(query) for query in queries)])


def _type(store: TileStore) -> str:
    return {"float32": "<f4", "float16": "<f2"}[store.manifest.score_type]


def _schema(store: TileStore) -> pa.Schema:
    manifest = store.manifest
    about = {
        "format": FORMAT,
        "dataset": manifest.dataset,
        "protocol": manifest.protocol,
        "policy": manifest.policy,
        "dtype": _type(store),
        "models": {name: asdict(entry) for name, entry in manifest.models.items()},
        "gallery_ids": store.gallery_ids,
        "source_order": store.source_order,
    }
    width = store.size("gallery") * np.dtype(_type(store)).itemsize
    fields = list(blocks.queries_batch(store.queries[:1]).schema)
    fields += [pa.field(_PREFIX + model, pa.binary(width)) for model in store.models]
    return pa.schema(fields, metadata={METADATA: json.dumps(about, ensure_ascii=False)})


def _binary(scores_BN: Array) -> pa.Array:
    rows = np.ascontiguousarray(scores_BN)
    kind = pa.binary(rows.shape[1] * rows.dtype.itemsize)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(rows)])


@dataclass(frozen=True)
class Export:
    """An exported file, opened.

    Attributes:
        draft: what the scores are about.
        spec: what opens the data set again.
        systems: model -> scores.
        entries: model -> what the store knew of it.
        digests: model -> digest of its scores when they were written.
    """

    draft: Draft
    spec: dict[str, Any]
    systems: dict[str, "ExportedScores"]
    entries: dict[str, ModelEntry]
    digests: dict[str, str]


@dataclass(frozen=True)
class ExportedScores:
    """One model of an exported file; satisfies `ForeignScores`."""

    file: pq.ParquetFile
    column: str
    dtype: str
    query_ids: Sequence[str]
    gallery_ids: Sequence[str]

    def shape(self) -> tuple[int, int]:
        """(queries, candidates)."""
        return len(self.query_ids), len(self.gallery_ids)

    def rows(self, rows: Sequence[int]) -> Array:
        """Rows of the file; reads only the row groups that hold them."""
        counts = [self.file.metadata.row_group(n).num_rows for n in range(self.file.num_row_groups)]
        ends = np.cumsum(counts)
        group_of = np.searchsorted(ends, rows, side="right")
        found = np.empty((len(rows), len(self.gallery_ids)), dtype=self.dtype)
        for group in np.unique(group_of).tolist():
            try:
                column = self.file.read_row_group(group, columns=[self.column]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.column} is damaged: {error}") from None
            values = b"".join(column.to_pylist())
            scores = np.frombuffer(values, dtype=self.dtype).reshape(counts[group], -1)
            wanted = np.flatnonzero(group_of == group)
            first = ends[group] - counts[group]
            found[wanted] = scores[np.asarray(rows)[wanted] - first]
        return found


def read_export(file: Path) -> Export:
    """Open a file that `export` wrote.

    Raises:
        DataError: it is not such a file, it was changed, or it is damaged.
    """
    try:
        return _read_export(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from None


def _read_export(file: Path) -> Export:
    try:
        parquet = pq.ParquetFile(file)
        metadata = (parquet.schema_arrow.metadata or {})[METADATA]
        about = json.loads(metadata)
        found = about["format"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{file} is not a file that `dafm tiles export` wrote") from None
    if found != FORMAT:
        raise DataError(f"{file} has format {found!r}; this version reads format {FORMAT!r}")
    footer = (parquet.metadata.metadata or {}).get(DIGESTS.encode())
    if footer is None:
        raise DataError(f"{file} was rewritten since the export: its digests are lost")
    try:
        digests = json.loads(footer)
        ids, models = about["gallery_ids"], list(about["models"])
        dtype = {"<f4": "float32", "<f2": "float16"}[about["dtype"]]
        _check_columns(file, parquet, models, len(ids) * np.dtype(dtype).itemsize)
        queries = blocks.queries_of(parquet.read(columns=blocks.QUERY_COLUMNS))
        sound = digests["labels"] == _labels_digest(metadata, queries)
        scores = dict(digests["scores"])
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{file}: labels or metadata have changed since the export")
    query_ids = [query.id for query in queries]
    spec = about["dataset"]
    draft = Draft(
        name=spec["name"],
        split=spec["split"],
        protocol=about["protocol"],
        policy=about["policy"],
        images=tuple((id, "") for _, id in sorted(zip(about["source_order"], ids, strict=True))),
        queries=queries,
        source=NoImages(),
        category=spec.get("category", ""),
    )
    systems = {
        name: ExportedScores(parquet, _PREFIX + name, dtype, query_ids, ids) for name in models
    }
    entries = {name: ModelEntry(**entry) for name, entry in about["models"].items()}
    return Export(draft, spec, systems, entries, scores)


def _check_columns(file: Path, parquet: pq.ParquetFile, models: Sequence[str], width: int) -> None:
    """DataError unless every column is there, of its type and without gaps."""
    expected = {field.name: field.type for field in blocks.queries_batch([]).schema}
    expected |= {_PREFIX + name: pa.binary(width) for name in models}
    found = {field.name: field.type for field in parquet.schema_arrow}
    for name, kind in expected.items():
        if name not in found:
            raise DataError(f"{file} lacks the column {name!r}")
        if found[name] != kind:
            raise DataError(f"{file}: the column {name!r} must hold {kind}, found {found[name]}")
    for group in range(parquet.num_row_groups):
        for name in expected:
            column = parquet.read_row_group(group, columns=[name]).column(0)
            lists = pa.types.is_list(column.type)
            inner = sum(chunk.values.null_count for chunk in column.chunks) if lists else 0
            if column.null_count + inner:
                raise DataError(f"{file}: the column {name!r} has empty cells")
