"""Parquet images into tars beside the tiles, on Ray Data.

A Parquet file is read in its own order, the gallery in hash order: one image would cost a row
group. So each row group is streamed once into tar shards below `images/` of the store, with an
index of what lies where. The index is written last; without it everything is unpacked again.
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from dafm_ray.datasets.base import Dataset
from dafm_ray.datasets.shards import ParquetImages, RowGroup, TarImages
from dafm_ray.progress import StatusWriter, progress
from dafm_ray.session import Row, cpu_resources, ensure_ray, explained, finished, quiet_data
from dafm_ray.tiles.store import TileStore

FOLDER = "images"
INDEX = f"{FOLDER}/index.arrow"
PART_BYTES = 64_000_000
"""Images of one tar, about; what bounds the memory of a task."""

MEMBER_BYTES = 768
"""What a tar takes for an image beside its bytes, about: a header, and the rest of a block."""

_FINGERPRINT = b"fingerprint"


def unpack(store: TileStore, dataset: Dataset, status: StatusWriter | None = None) -> Dataset:
    """The data set with images that can be opened in any order; unpacks Parquet shards once.

    Args:
        store: receives the tars; other sources are left as they are.
        dataset: what is searched.
        status: as in `progress`.
    """
    source = dataset.source
    if not isinstance(source, ParquetImages) or _is_unpacked(store, source):
        return unpacked(store, dataset)
    import ray.data

    ensure_ray()
    quiet_data()
    parts = source.row_groups()
    rows = [{"part": pickle.dumps(part)} for part in parts]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        unpack_part,
        fn_kwargs={"source": source, "store": store},
        num_cpus=1,
        resources=cpu_resources(),
    )
    places: dict[str, str] = {}
    with progress("unpack", len(parts), unit="row group", write_status=status) as shown:
        for row in map(finished, stream.iter_rows()):
            places |= pickle.loads(row["places"])
            shown.advance()
    table = pa.table({"locator": list(places), "place": list(places.values())})
    sink = pa.BufferOutputStream()
    schema = table.schema.with_metadata({_FINGERPRINT: source.fingerprint()})
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    store.storage.write(INDEX, sink.getvalue())
    return unpacked(store, dataset)


def unpacked(store: TileStore, dataset: Dataset) -> Dataset:
    """The data set with the store's tars as its source, if it has some for this source."""
    source = dataset.source
    if not isinstance(source, ParquetImages) or not _is_unpacked(store, source):
        return dataset
    rows = _index(store).to_pydict()
    place_of = dict(zip(rows["locator"], rows["place"], strict=True))
    tars = sorted({place.rpartition("|")[0] for place in place_of.values()})
    number = {tar: n for n, tar in enumerate(tars)}
    filesystem, base = store.storage.location

    def locator(old: str) -> str:
        tar, _, place = place_of.get(old, "").rpartition("|")
        return f"{number[tar]}:{place}" if tar else ""

    gallery = replace(dataset.gallery, locators=tuple(map(locator, dataset.gallery.locators)))
    images = TarImages(filesystem, tuple(f"{base}/{tar}" for tar in tars))
    return replace(dataset, gallery=gallery, source=images)


def bytes_to_unpack(store: TileStore | None, dataset: Dataset) -> int:
    """About what `unpack` would write; 0 where there is nothing to unpack, or it is there.

    Args:
        store: None where it is yet to be made.
        dataset: what is searched.
    """
    source = dataset.source
    if not isinstance(source, ParquetImages):
        return 0
    if store is not None and _is_unpacked(store, source):
        return 0
    # Parquet hardly compresses image files.
    return source.size() + MEMBER_BYTES * len(dataset.gallery)


def _is_unpacked(store: TileStore, source: ParquetImages) -> bool:
    try:
        found = (_index(store).schema.metadata or {}).get(_FINGERPRINT)
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return bool(found == source.fingerprint().encode())


def _index(store: TileStore) -> pa.Table:
    with pa.ipc.open_file(store.storage.read(INDEX)) as reader:
        return reader.read_all()


def unpack_part(row: Row, source: ParquetImages, store: TileStore) -> Row:
    """Write the tars of one row group; says where each image lies."""
    return explained(lambda: _unpack_part(pickle.loads(row["part"]), source, store), row)


def _unpack_part(part: RowGroup, source: ParquetImages, store: TileStore) -> Row:
    places: dict[str, str] = {}
    rows = 0
    for n, members in enumerate(_parts(source.stream(part))):
        path = f"{FOLDER}/{part.shard:05d}-{part.number:05d}-{n:05d}.tar"
        data, offsets = _tar(members)
        store.storage.write(path, pa.py_buffer(data))
        for offset, (_, image) in zip(offsets, members, strict=True):
            places[f"{part.shard}:{part.number}:{rows}"] = f"{path}|{offset}:{len(image)}"
            rows += 1
    return {"places": pickle.dumps(places)}


Members = list[tuple[str, bytes]]
"""(name, bytes of the image file)"""


def _parts(images: Iterator[tuple[str, bytes]]) -> Iterator[Members]:
    members: Members = []
    size = 0
    for name, data in images:
        members.append((name, data))
        size += len(data)
        if size >= PART_BYTES:
            yield members
            members, size = [], 0
    if members:
        yield members


def _tar(members: Members) -> tuple[bytes, list[int]]:
    """A tar file and the offset of each member's bytes in it."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sink.seek(0)
    with tarfile.open(fileobj=sink, mode="r:") as tar:
        offsets = [member.offset_data for member in tar]
    return sink.getvalue(), offsets
