"""Images inside shards: webdataset tar files, or Parquet files with a column of image bytes.

A tar is read in place: one scan of its headers, then every image by its offset. A Parquet file can
only be read in its own order, so precompute first unpacks it into tars (`tiles.unpack`).
Shards lie on this machine or behind a URI of pyarrow's or fsspec's.
"""

import functools
import tarfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import fs

from dafm_ray.datasets.base import Draft, ImageSource, digest, refuse_duplicates
from dafm_ray.datasets.images import SUFFIXES, ImageError, decode
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.remote import failure, impatient, open_filesystem, retried
from dafm_ray.uris import is_uri, local_path, shown

ID, IMAGE = "id", "image"
"""Columns of a Parquet shard. `image` holds bytes, or a struct with `bytes` as Hugging Face
writes it."""

_KINDS = (".tar", ".parquet")
_NAMES = "`.tar` (uncompressed) or `.parquet`"
_READERS = 16
_ROWS = 16
"""Parquet rows in memory at a time."""

_BUFFER_BYTES = 1 << 20
"""A column is read in buffers of this size; otherwise a whole row group is held in memory."""


@dataclass(frozen=True)
class ShardedImages(ABC):
    """Images in shards; the empty locator stands for an image that no shard holds.

    Attributes:
        filesystem: where the shards lie.
        shards: their paths on it.
    """

    filesystem: fs.FileSystem
    shards: tuple[str, ...]

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie behind a URI."""
        return not isinstance(self.filesystem, fs.LocalFileSystem)

    def open(self, locator: str) -> Image.Image:
        """Read and decode one image."""
        return decode(self.read(locator))

    def read(self, locator: str) -> bytes:
        """Read one image by its place."""
        if not locator:
            raise ImageError("no shard holds it")
        shard, *place = (int(number) for number in locator.split(":"))
        return self._read(shard, *place)

    @abstractmethod
    def _read(self, shard: int, first: int, second: int) -> bytes: ...


class TarImages(ShardedImages):
    """Images in uncompressed tar files; a locator is `shard:offset:size`."""

    @functools.cached_property
    def _impatient(self) -> fs.FileSystem:
        return impatient(self.filesystem)

    def _read(self, shard: int, first: int, second: int) -> bytes:
        def read() -> bytes:
            with self._impatient.open_input_file(self.shards[shard]) as file:
                found: bytes = file.read_at(second, first)
            return found

        try:
            # A server that is busy must not put sound images into quarantine.
            data = retried(read, "read", self.shards[shard]) if self.is_remote else read()
        except OSError as error:
            raise ImageError(f"{self.shards[shard]} cannot be read: {error}") from None
        if len(data) < second:
            raise ImageError(f"{self.shards[shard]} ends inside this image")
        return data


@dataclass(frozen=True)
class RowGroup:
    """A part of a Parquet shard that is read on its own."""

    shard: int
    number: int


class ParquetImages(ShardedImages):
    """Images in Parquet files; a locator is `shard:row group:row`.

    Opening one image is slow, since everything before it in its row group is read.
    """

    def _read(self, shard: int, first: int, second: int) -> bytes:
        for row, (_, data) in enumerate(self.stream(RowGroup(shard, first))):
            if row == second:
                return data
        raise ImageError(f"{self.shards[shard]} has no such row")

    def row_groups(self) -> list[RowGroup]:
        """All row groups of all shards."""
        counts = _parallel(lambda path: _parquet(self.filesystem, path).num_row_groups, self.shards)
        return [RowGroup(s, number) for s, count in enumerate(counts) for number in range(count)]

    def stream(self, part: RowGroup) -> Iterator[tuple[str, bytes]]:
        """(id, bytes) of the images of a row group; empty bytes where there are none."""
        file = _parquet(self.filesystem, self.shards[part.shard])
        path = self.shards[part.shard]
        for batch in _batches(file, path, part.number):
            images = batch.column(IMAGE)
            if pa.types.is_struct(images.type):
                images = images.field("bytes")
            for id, image in zip(batch.column(ID), images, strict=True):
                yield str(id.as_py()), image.as_py() or b""

    def size(self) -> int:
        """Bytes of all shards."""
        infos = self.filesystem.get_file_info(list(self.shards))
        return sum(info.size or 0 for info in infos)

    def fingerprint(self) -> str:
        """Digest of the shards' paths, sizes and times: equal while nobody replaces one."""
        infos = self.filesystem.get_file_info(list(self.shards))
        return digest(f"{info.path} {info.size} {info.mtime_ns}" for info in infos)


Shards = tuple[TarImages | ParquetImages, dict[str, str]]
"""A source, and the locator of every image by its name, in the order of the shards."""


def open_shards(where: str) -> Shards:
    """Open the shards a path names.

    Args:
        where: a file, a folder, a pattern in the last part of a path, or a URI of one of these; all
            tar or all Parquet.

    Raises:
        ConfigError: the URI cannot be opened, or no shard is there.
        DataError: a shard cannot be read, or an image stands twice.
    """
    filesystem, paths = _find(where)
    kinds = {PurePosixPath(path).suffix for path in paths}
    if len(kinds) > 1:
        raise ConfigError(f"{where} holds tar and Parquet shards; name one kind, as {where}/*.tar")
    source = TarImages if kinds == {".tar"} else ParquetImages
    scan = functools.partial(_scan_tar if kinds == {".tar"} else _scan_parquet, filesystem)
    found = [
        (name, f"{shard}:{place}")
        for shard, members in enumerate(_parallel(scan, paths))
        for name, place in members
    ]
    refuse_duplicates([name for name, _ in found], f"{where}: image")
    return source(filesystem, tuple(paths)), dict(found)


def stored_in(draft: Draft, source: ImageSource, places: Mapping[str, str]) -> Draft:
    """The draft with its images read from shards: by file name, else by id."""
    by_stem: defaultdict[str, list[str]] = defaultdict(list)
    for name in places:
        by_stem[PurePosixPath(name).stem].append(name)

    def place(id: str, locator: str) -> str:
        exact = places.get(locator) or places.get(id)
        names = by_stem.get(id, [])
        if not exact and len(names) > 1:
            raise DataError(f"{id!r} may be {names[0]!r} or {names[1]!r} of the shards; keep one")
        return exact or (places[names[0]] if names else "")

    images = tuple((id, place(id, locator)) for id, locator in draft.images)
    return replace(draft, images=images, source=source)


def _find(where: str) -> tuple[fs.FileSystem, list[str]]:
    if is_uri(where):
        filesystem, path = open_filesystem(where)
    else:
        filesystem, path = fs.LocalFileSystem(), str(local_path(where).absolute())
    folder, _, pattern = path.rpartition("/")
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            if not path.endswith(_KINDS):
                raise ConfigError(f"{where} is no shard; name files that end in {_NAMES}")
            return filesystem, [path]
        below = info.type == fs.FileType.Directory
        if below:
            folder, pattern = path, "*"
        selector = fs.FileSelector(folder, allow_not_found=True, recursive=below)
        listed = filesystem.get_file_info(selector)
    except OSError as error:
        unlisted = ConfigError(f"cannot list {shown(where)}: {error}")
        raise failure(error, where, unlisted) from None
    paths = sorted(
        entry.path
        for entry in listed
        if entry.type == fs.FileType.File
        and entry.path.endswith(_KINDS)
        and fnmatch(entry.base_name, pattern)
    )
    if not paths:
        raise ConfigError(f"{where} holds no shards; name files that end in {_NAMES}")
    return filesystem, paths


def _scan_tar(filesystem: fs.FileSystem, path: str) -> list[tuple[str, str]]:
    """(name, `offset:size`) of the images of a shard."""
    found: list[tuple[str, str]] = []
    try:
        with filesystem.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                    name = member.name.removeprefix("./")
                    found.append((name, f"{member.offset_data}:{member.size}"))
                tar.members = []  # type: ignore[attr-defined]  # a kilobyte an image
    except (tarfile.TarError, OSError) as error:
        unsound = DataError(f"{path} cannot be read as an uncompressed tar: {error}")
        raise failure(error, path, unsound) from None
    return found


def _scan_parquet(filesystem: fs.FileSystem, path: str) -> list[tuple[str, str]]:
    """(id, `row group:row`) of the images of a shard."""
    file = _parquet(filesystem, path)
    found: list[tuple[str, str]] = []
    for number in range(file.num_row_groups):
        try:
            column = file.read_row_group(number, columns=[ID]).column(ID)
        except (pa.ArrowException, OSError) as error:
            raise failure(error, path, DataError(f"{path} is damaged: {error}")) from None
        if column.null_count:
            raise DataError(f"{path} has rows without {ID!r}")
        ids = column.to_pylist()
        found.extend((str(id), f"{number}:{row}") for row, id in enumerate(ids))
    return found


def _batches(file: pq.ParquetFile, path: str, row_group: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(_ROWS, row_groups=[row_group], columns=[ID, IMAGE])
    except (pa.ArrowException, OSError) as error:
        raise failure(error, path, DataError(f"{path} is damaged: {error}")) from None


def _parquet(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(filesystem.open_input_file(path), buffer_size=_BUFFER_BYTES)
    except (pa.ArrowInvalid, OSError) as error:
        raise failure(error, path, DataError(f"{path} is not a Parquet file: {error}")) from None
    kinds = {field.name: field.type for field in file.schema_arrow}
    image = kinds.get(IMAGE)
    if image is not None and pa.types.is_struct(image):
        names = [image.field(n).name for n in range(image.num_fields)]
        image = image.field("bytes").type if "bytes" in names else None
    named = ID in kinds and (_is_text(kinds[ID]) or pa.types.is_integer(kinds[ID]))
    if not named or image is None or not _holds_bytes(image):
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise DataError(
            f"{path} must have the columns {ID!r} (text or whole numbers) and {IMAGE!r} (bytes, or "
            f"a struct with 'bytes'); found {found}"
        )
    return file


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _parallel(action: Any, items: Sequence[str]) -> list[Any]:
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(action, items))
