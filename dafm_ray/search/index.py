"""An exact index of image features, and how it is kept.

faiss finds what may belong to the first k; their scores are then computed anew in double precision.
A matrix product rounds a vector by its place in the matrix and by the number of queries, so equal
vectors would not always tie, and an order could depend on batches and shards.

Shape letters: Q queries, N candidates, V vectors of a candidate, D their width.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dafm_ray.errors import ConfigError, DataError, refusals
from dafm_ray.files import replacing, write_text

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

FORMAT = 1
VECTORS, IDS, RECORD = "index.faiss", "ids.arrow", "index.json"

SPARE = 16
"""Vectors asked for beyond the first k, so that most ties at place k need no second search."""

ROUNDING = 2.0**-24
"""Of float32; a dot product of width D is off by at most (D + 2) of these, times the lengths."""

FOUND_AT_ONCE = 1 << 22
"""Vectors found for a block of queries; what bounds the memory of a search."""

LENGTH_ERROR = 1e-3


class Unusable(NamedTuple):
    """An image or a query that could not be used, and why."""

    id: str
    reason: str


class Block(NamedTuple):
    """Some candidates, in stored order.

    Attributes:
        ids: of the candidates.
        features: (n, D) or (n, V, D), vectors of length 1; empty if there are no ids.
        unusable: images that are in no index.
    """

    ids: Sequence[str]
    features: NDArray[Any]
    unusable: Sequence[Unusable] = ()


class Index(Protocol):
    """What finds the nearest candidates. A column is a candidate's place in `ids`."""

    @property
    def ids(self) -> Sequence[str]:
        """(N,) ids of the candidates in stored order."""
        ...

    @property
    def unusable(self) -> Sequence[Unusable]:
        """Images of the gallery that are not in it."""
        ...

    def search(self, queries_QD: Floats, k: int) -> tuple[Floats, Ints]:
        """The k candidates of the highest scores, see `FlatIndex.search`."""
        ...

    def scores(self, queries_QD: Floats, columns_QK: Ints) -> Floats:
        """Scores of given candidates, see `FlatIndex.scores`."""
        ...

    def images(self, columns_N: Ints) -> Floats:
        """One vector an image, see `FlatIndex.images`."""
        ...


class FlatIndex:
    """Exact inner products with float32 vectors of length 1 (faiss IndexFlatIP).

    A candidate of several vectors scores as the best of them.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        """Take all blocks in; see `add`."""
        self.ids: list[str] = []
        self.unusable: list[Unusable] = []
        self._faiss: Any = None
        self._shape: tuple[int, ...] = ()
        for block in blocks:
            self.add(block)
        if not self.ids:
            raise no_images(self.unusable)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """D."""
        return self._shape[-1]

    @property
    def _each(self) -> int:
        """Vectors of a candidate."""
        return self._shape[0] if len(self._shape) == 2 else 1

    @property
    def _vectors(self) -> Floats:
        """(N, V, D)."""
        import faiss

        kept: Floats = faiss.rev_swig_ptr(self._faiss.get_xb(), len(self) * self._each * self.width)
        return kept.reshape(len(self), self._each, self.width)

    @property
    def vectors(self) -> Floats:
        """(N, D) or (N, V, D) float32 as they were given; a view that ends with the index."""
        return self._vectors.reshape(len(self), *self._shape)

    def add(self, block: Block) -> None:
        """Take further candidates in, behind those that are there.

        Raises:
            DataError: ids and features differ in number, features have another shape than earlier
                ones, are no numbers or not of length 1.
        """
        import faiss

        self.unusable += block.unusable
        if not len(block.ids):
            return
        features = checked(block, self._shape)
        if self._faiss is None:
            self._shape = features.shape[1:]
            self._faiss = faiss.IndexFlatIP(self.width)
        self._faiss.add(features.reshape(-1, self.width))
        self.ids += block.ids

    def search(self, queries_QD: Floats, k: int) -> tuple[Floats, Ints]:
        """The k candidates of the highest scores.

        Args:
            queries_QD: float32.
            k: how many, at most N.

        Returns:
            (Q, k) float32 scores, descending, and (Q, k) int64 columns; among equal scores the
            stored order decides, also at place k.

        Raises:
            DataError: k is larger than the gallery, or queries are not (Q, D) numbers.
        """
        refuse_more(k, len(self))
        queries_QD = self._queries(queries_QD)
        scores_QK = np.empty((len(queries_QD), k), np.float32)
        columns_QK = np.empty((len(queries_QD), k), np.int64)
        total = len(self) * self._each
        asked = min(total, k * self._each + SPARE)
        todo = np.arange(len(queries_QD))
        while len(todo):
            open_ones = []
            step = max(1, FOUND_AT_ONCE // asked)
            for start in range(0, len(todo), step):
                rows = todo[start : start + step]
                for q, near, vectors in zip(
                    rows, *self._faiss.search(queries_QD[rows], asked), strict=True
                ):
                    first = self._first(queries_QD[q], near, vectors, k, asked == total)
                    if first is None:
                        open_ones.append(q)
                    else:
                        scores_QK[q], columns_QK[q] = first
            todo, asked = np.array(open_ones, np.int64), min(total, 4 * asked)
        return scores_QK, columns_QK

    def _first(
        self, query_D: Floats, near: Floats, vectors: Ints, k: int, complete: bool
    ) -> tuple[Floats, Ints] | None:
        """The first k among the nearest vectors; None if one that was not found may belong there.

        Args:
            query_D: the query.
            near: dot products as faiss has them, descending.
            vectors: their numbers.
            k: how many candidates.
            complete: whether there are no other vectors.
        """
        columns, first_seen = np.unique(vectors // self._each, return_index=True)
        if len(columns) < k:
            return None
        best = near[first_seen].astype(np.float64)
        # What scores as high as place k truly does may look lower by two errors of rounding.
        error = (self.width + 2) * ROUNDING * float(np.linalg.norm(query_D)) * (1 + LENGTH_ERROR)
        bound = float(np.partition(best, -k)[-k]) - 2 * error
        if not complete and float(near[-1]) >= bound:
            return None
        columns = columns[best >= bound]
        exact = self._exact(query_D, columns)
        order = np.argsort(-exact, kind="stable")[:k]
        return exact[order], columns[order]

    def scores(self, queries_QD: Floats, columns_QK: Ints) -> Floats:
        """Scores of given candidates, to the bit those of `search`.

        Args:
            queries_QD: float32.
            columns_QK: -1 where a query has fewer than K.

        Returns:
            (Q, K) float32, NaN for -1.
        """
        scores_QK = np.full(columns_QK.shape, np.nan, np.float32)
        for scores_K, query_D, columns_K in zip(
            scores_QK, self._queries(queries_QD), columns_QK, strict=True
        ):
            there = columns_K >= 0
            scores_K[there] = self._exact(query_D, columns_K[there])
        return scores_QK

    def _exact(self, query_D: Floats, columns: Ints) -> Floats:
        vectors_NVD = self._vectors[columns].astype(np.float64)
        scores: Floats = (vectors_NVD @ query_D.astype(np.float64)).max(axis=1).astype(np.float32)
        return scores

    def images(self, columns_N: Ints) -> Floats:
        """(n, D) of length 1: the vector of each candidate, or the mean of its vectors."""
        return pooled(self._vectors[columns_N])

    def _queries(self, queries_QD: Floats) -> Floats:
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.width:
            raise DataError(
                f"queries have the shape {queries_QD.shape}; this index takes (Q, {self.width})"
            )
        if not np.isfinite(queries_QD).all():
            raise DataError("features of a query are no numbers")
        return np.ascontiguousarray(queries_QD, np.float32)

    def save(self, folder: Path, digest: str) -> None:
        """Write the index; it is there when all of it is.

        Args:
            folder: its own; `index.faiss`, `ids.arrow` and `index.json` in it are replaced.
            digest: of what the vectors were made from.

        Raises:
            MachineError: the folder cannot be written.
        """
        import faiss

        with refusals(folder):
            (folder / RECORD).unlink(missing_ok=True)
        with replacing(folder / VECTORS) as file:
            faiss.write_index(self._faiss, str(file))
        table = pa.table({"id": pa.array(self.ids, pa.string())})
        with (
            replacing(folder / IDS) as file,
            pa.OSFile(str(file), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        record = {
            "format": FORMAT,
            "digest": digest,
            "count": len(self),
            "shape": self._shape,
            "checksums": {name: _checksum(folder / name) for name in (VECTORS, IDS)},
            "unusable": [unusable._asdict() for unusable in self.unusable],
        }
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, digest: str, where: str = "") -> "FlatIndex":
        """Read an index that `save` wrote.

        Args:
            folder: of the index.
            digest: of what its vectors shall be made from.
            where: what messages call the folder, if it is a copy.

        Raises:
            DataError: there is none, it was made from something else, a file is damaged, or ids and
                vectors differ in number.
        """
        import faiss

        where = where or str(folder)
        record = _record(folder, where)
        if record["digest"] != digest:
            raise DataError(
                f"{where} holds the index of other weights or another gallery (its digest is "
                f"{record['digest']}, asked for is {digest}); delete it, or choose another folder"
            )
        for name, stored in record["checksums"].items():
            try:
                found = _checksum(folder / name)
            except OSError as error:
                raise _damaged(where, f"{name} cannot be read: {error.strerror}") from None
            if found != stored:
                raise _damaged(where, f"{name} has changed since it was written")
        index = cls.__new__(cls)
        try:
            index._faiss = faiss.read_index(str(folder / VECTORS))
            with pa.memory_map(str(folder / IDS)) as file, pa.ipc.open_file(file) as reader:
                index.ids = reader.read_all()["id"].to_pylist()
        except (RuntimeError, OSError, KeyError, pa.ArrowInvalid) as error:
            raise _damaged(where, str(error).splitlines()[0]) from None
        index._shape = tuple(record["shape"])
        index.unusable = [Unusable(**unusable) for unusable in record["unusable"]]
        kept = len(index) * index._each, index.width
        if len(index) != record["count"] or kept != (index._faiss.ntotal, index._faiss.d):
            raise _damaged(
                where,
                f"it says {record['count']} candidates of shape {record['shape']}, and has "
                f"{len(index)} ids and {index._faiss.ntotal} vectors of width {index._faiss.d}",
            )
        return index


def _record(folder: Path, where: str) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_bytes())
        found = record["format"]
        if found == FORMAT:
            record["digest"], record["count"], record["shape"], record["unusable"]
            record["checksums"][VECTORS], record["checksums"][IDS]
    except FileNotFoundError:
        raise DataError(f"{where} holds no index: it has no {RECORD}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(where, f"{RECORD} cannot be read") from None
    if found != FORMAT:
        raise DataError(f"{where} has format {found}; this version reads format {FORMAT}")
    return dict(record)


def _damaged(where: str, what: str) -> DataError:
    return DataError(f"the index {where} is damaged: {what}; delete the folder to make it again")


def _checksum(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()


def checked(block: Block, shape: tuple[int, ...]) -> Floats:
    """The features of a block as contiguous float32; see `FlatIndex.add` for what is refused.

    Args:
        block: of at least one candidate.
        shape: of the features of one candidate; empty where there are none yet.
    """
    features = np.ascontiguousarray(block.features, np.float32)
    if features.ndim not in (2, 3) or len(features) != len(block.ids):
        raise DataError(
            f"{len(block.ids)} candidates have features of shape {features.shape}; an index takes "
            "(N, D), or (N, V, D) for several vectors a candidate"
        )
    if shape and features.shape[1:] != shape:
        raise DataError(
            f"features of {block.ids[0]} have the shape {features.shape[1:]}, those before {shape}"
        )
    lengths = np.linalg.norm(features, axis=-1).reshape(len(features), -1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= LENGTH_ERROR).all(axis=1))
    if len(wrong):
        raise DataError(
            f"features of {block.ids[wrong[0]]} have length {lengths[wrong[0]].max():g}; an index "
            "takes vectors of length 1"
        )
    return features


def refuse_more(k: int, candidates: int) -> None:
    """Refuse to search for no candidates or for more than there are."""
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    if k > candidates:
        raise DataError(f"k is {k}, and the index has {candidates} candidates; lower k")


def no_images(unusable: Sequence[Unusable]) -> DataError:
    """Nothing is left to search."""
    first = f": {unusable[0].id}: {unusable[0].reason}" if unusable else ""
    return DataError(f"no image of the gallery can be used, {len(unusable)} cannot{first}")


def pooled(features: NDArray[Any]) -> Floats:
    """(B, ..., D) -> (B, D) of length 1, the mean over the axes between."""
    flat = features.astype(np.float32).reshape(len(features), -1, features.shape[-1]).mean(axis=1)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    unit: Floats = np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0)
    return unit
