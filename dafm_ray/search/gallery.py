"""The index of a data set's gallery under one model, made once and kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dafm_ray.datasets.base import Dataset, ImageSource, digest
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.shards import ShardedImages
from dafm_ray.datasets.sources import ImageFiles
from dafm_ray.models.base import FrozenModel
from dafm_ray.models.checkpoints import weights_digest
from dafm_ray.models.registry import resolve
from dafm_ray.progress import StatusWriter
from dafm_ray.search.encode import gallery_blocks
from dafm_ray.search.index import IDS, RECORD, VECTORS, FlatIndex, Index
from dafm_ray.search.sharded import ShardedIndex
from dafm_ray.storage import fetched, open_storage, results
from dafm_ray.uris import is_uri, join, shown

BATCH = 64


def identity_of(model_id: str) -> str:
    """What a model's features come from, wherever its files lie: `family:variant@` and the digest
    of its weights.

    Raises:
        ConfigError, DataError: see `resolve` and `weights_digest`.
    """
    parsed = resolve(model_id)[1]
    return f"{parsed.family}:{parsed.variant}@{weights_digest(parsed.weights)}"


def index_digest(identity: str, dataset: Dataset) -> str:
    """Digest of what an index is made from. Files are known by their names, sizes and times of
    change: none of them is opened.

    Args:
        identity: of the model, see `identity_of`.
        dataset: whose gallery.
    """
    gallery = dataset.gallery
    states = zip(gallery.locators, _states(dataset.source, gallery.locators), strict=True)
    images = digest([f"{locator} {state}" for locator, state in states])
    return digest([identity, dataset.name, _place(dataset.source), gallery.digest, images])


def _place(source: ImageSource) -> str:
    if isinstance(source, ImageFiles):
        return shown(source.root) if is_uri(source.root) else str(Path(source.root).resolve())
    if isinstance(source, ShardedImages):
        infos = source.filesystem.get_file_info(list(source.shards))
        return digest([f"{info.path} {info.size} {info.mtime_ns}" for info in infos])
    return type(source).__qualname__


def _states(source: ImageSource, locators: Sequence[str]) -> list[str]:
    """What changes when an image file is replaced under its name; empty if it is in a shard, or
    missing.
    """
    return source.versions(locators) if isinstance(source, ImageFiles) else [""] * len(locators)


def gallery_index(
    model: FrozenModel,
    identity: str,
    dataset: Dataset,
    cache: str | None,
    device: str = "cpu",
    batch: int = BATCH,
    write_status: StatusWriter | None = None,
) -> tuple[FlatIndex, bool]:
    """The index of a gallery: the kept one if nothing that it is made from has changed.

    Args:
        model: frozen, on `device`.
        identity: of the model, see `identity_of`.
        dataset: whose gallery.
        cache: path or URI of indexes, each in a folder named by its digest; None keeps none.
        device: torch device.
        batch: images of one forward pass.
        write_status: stores the bytes of `status.json`.

    Returns:
        The index, and whether it was built now. One with images that could not be used is built
        again when one of them can be opened.

    Raises:
        ConfigError: the model's scores are no inner products.
        DataError: the kept index is damaged or is another one, or no image can be used.
        MachineError: the folder cannot be written.
    """
    made_from = index_digest(identity, dataset)
    where = join(cache, made_from[:16]) if cache else None
    if where and open_storage(where).exists(RECORD):
        with fetched(where, (RECORD, VECTORS, IDS)) as folder:
            kept = FlatIndex.load(folder, made_from, shown(where))
        if not any(_opens(dataset, id) for id, _ in kept.unusable):
            return kept, False
    index = FlatIndex(gallery_blocks(model, dataset, device, batch, write_status))
    if where:
        open_storage(where).delete(RECORD)  # files of a URI are replaced one by one
        with results(where, RECORD) as folder:
            index.save(folder, made_from)
    return index, True


def _opens(dataset: Dataset, id: str) -> bool:
    gallery = dataset.gallery
    try:
        dataset.source.open(gallery.locators[gallery.position(id)])
    except ImageError:
        return False
    return True


@contextmanager
def open_index(
    model: FrozenModel,
    identity: str,
    dataset: Dataset,
    cache: str,
    device: str,
    batch: int,
    shards: int,
    write_status: StatusWriter,
) -> Iterator[tuple[Index, bool]]:
    """The index of a gallery in this process, or in actors, which end with it; and whether it was
    built now.

    Args:
        model: frozen, on `device`.
        identity: of the model, see `identity_of`.
        dataset: whose gallery.
        cache: path or URI of indexes; shards are not kept.
        device: torch device.
        batch: images of one forward pass.
        shards: actors; 0 for none.
        write_status: stores the bytes of `status.json`.
    """
    if shards:
        blocks = gallery_blocks(model, dataset, device, batch, write_status)
        with ShardedIndex(blocks, len(dataset.gallery), shards) as sharded:
            yield sharded, True
    else:
        yield gallery_index(model, identity, dataset, cache, device, batch, write_status)
