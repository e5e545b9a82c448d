"""How an array, a gallery and queries become Arrow IPC files."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dafm_ray.datasets.base import Query
from dafm_ray.errors import DataError

Array = NDArray[Any]

QUERY_COLUMNS = [field.name for field in fields(Query)]
_LISTS = ("captions", "targets", "excluded", "group")


def checksum(data: pa.Buffer) -> str:
    """XXH3-128 of a file's bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(memoryview(data))


class ScoresDigest:
    """XXH3-128 of a system's scores, query by query in stored order."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    def update(self, scores_BN: Array) -> None:
        """Take further queries; every NaN counts as the same."""
        rows = np.where(np.isnan(scores_BN), np.nan, scores_BN).astype(np.float32)
        self._hasher.update(np.ascontiguousarray(rows).data.cast("B"))

    def hex(self) -> str:
        """The digest."""
        return self._hasher.hexdigest()


def encode_array(values: Array) -> pa.Buffer:
    """(rows, ...) array -> Arrow IPC file with one fixed-shape tensor a row, in column `values`."""
    rows = np.ascontiguousarray(values)
    row_shape = rows.shape[1:]
    width = int(np.prod(row_shape))
    flat = pa.array(rows.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, width)
    kind = pa.fixed_shape_tensor(flat.type, list(row_shape))
    column = pa.ExtensionArray.from_storage(kind, lists)
    return _to_file(pa.record_batch([column], names=["values"]))


def decode_array(data: pa.Buffer) -> Array:
    """Inverse of `encode_array`; a read-only view into `data`, without a copy."""
    with pa.ipc.open_file(data) as reader:
        column = reader.get_batch(0).column(0)
    flat = column.storage.flatten().to_numpy(zero_copy_only=True)
    values: Array = flat.reshape(len(column), *column.type.shape)
    return values


def encode_gallery(ids: Sequence[str], source_order: Sequence[int]) -> pa.Buffer:
    """Gallery ids in hash order with their position in the source."""
    columns = [pa.array(ids, pa.string()), pa.array(source_order, pa.int64())]
    return _to_file(pa.record_batch(columns, names=["id", "source_order"]))


def decode_gallery(data: pa.Buffer) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Inverse of `encode_gallery`."""
    columns = _from_file(data).to_pydict()
    return tuple(columns["id"]), tuple(columns["source_order"])


def encode_queries(queries: Sequence[Query]) -> pa.Buffer:
    """Queries in stored order."""
    return _to_file(queries_batch(queries))


def queries_batch(queries: Sequence[Query]) -> pa.RecordBatch:
    """A row a query, a column a field."""
    columns = {
        name: pa.array([list(getattr(q, name)) for q in queries], pa.list_(pa.string()))
        if name in _LISTS
        else pa.array([getattr(q, name) for q in queries], pa.string())
        for name in QUERY_COLUMNS
    }
    return pa.record_batch(list(columns.values()), names=list(columns))


def decode_queries(data: pa.Buffer) -> tuple[Query, ...]:
    """Inverse of `encode_queries`."""
    return queries_of(_from_file(data))


def queries_of(table: pa.Table) -> tuple[Query, ...]:
    """Inverse of `queries_batch`."""
    columns = table.to_pydict()
    for name in _LISTS:
        columns[name] = [tuple(row) for row in columns[name]]
    values = [columns[name] for name in QUERY_COLUMNS]
    return tuple(Query(*row) for row in zip(*values, strict=True))


def _to_file(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _from_file(data: pa.Buffer) -> pa.Table:
    try:
        with pa.ipc.open_file(data) as reader:
            return reader.read_all()
    except pa.ArrowInvalid as error:
        raise DataError(f"not an Arrow IPC file: {error}") from None
