"""Decoding every image of a data set on Ray Data, to see which can be used and which are twins."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import xxhash
from PIL import Image

from dafm_ray.datasets.base import ImageSource
from dafm_ray.datasets.images import ImageError, decode, oddities
from dafm_ray.datasets.shards import ParquetImages, RowGroup
from dafm_ray.datasets.sources import StoredImages
from dafm_ray.session import (
    Row,
    available_cpus,
    cpu_resources,
    ensure_ray,
    explained,
    finished,
    quiet_data,
)

CHUNKS = (64, 1024)
"""Images of one task, at least and at most: enough to pay for the task, few enough for all CPUs."""

TASKS_PER_CPU = 8

Task = tuple[str, ...] | RowGroup
"""What is read at once: locators, or a row group of a Parquet shard."""


@dataclass(frozen=True)
class Inspection:
    """One image.

    Attributes:
        reason: why it cannot be used; empty if it can.
        odd: what decoding does to it beyond reading it.
        pixels: digest of its size and RGB pixels; empty if it cannot be used.
    """

    locator: str
    reason: str = ""
    odd: tuple[str, ...] = ()
    pixels: bytes = b""


def inspect_images(source: ImageSource, locators: Sequence[str]) -> Iterator[list[Inspection]]:
    """Decode images in parallel, a chunk at a time, in no order; starts Ray if there is none.

    Args:
        source: opens them; a Parquet source is read whole, in its own order.
        locators: of the images.
    """
    import ray.data

    if not locators:
        return
    ensure_ray()
    tasks: list[Task] = list(_chunks(locators, available_cpus()))
    if isinstance(source, ParquetImages):
        tasks = list(source.row_groups())
    quiet_data()
    rows = [{"task": pickle.dumps(task)} for task in tasks]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        inspect_task, fn_kwargs={"source": source}, num_cpus=1, resources=cpu_resources()
    )
    for row in map(finished, stream.iter_rows()):
        yield pickle.loads(row["found"])


def _chunks(locators: Sequence[str], cpus: float) -> Iterator[tuple[str, ...]]:
    smallest, largest = CHUNKS
    size = min(max(int(len(locators) / (TASKS_PER_CPU * cpus)), smallest), largest)
    for start in range(0, len(locators), size):
        yield tuple(locators[start : start + size])


def inspect_task(row: Row, source: ImageSource) -> Row:
    """Inspect the images of one task."""
    return explained(lambda: {"found": pickle.dumps(list(_inspect(row, source)))}, row)


def _inspect(row: Row, source: ImageSource) -> Iterator[Inspection]:
    task: Task = pickle.loads(row["task"])
    if isinstance(task, RowGroup):
        assert isinstance(source, ParquetImages)
        for n, (_, data) in enumerate(source.stream(task)):
            yield inspect(f"{task.shard}:{task.number}:{n}", data)
        return
    for locator in task:
        try:
            if hasattr(source, "read"):
                yield inspect(locator, cast(StoredImages, source).read(locator))
            else:
                yield Inspection(locator, pixels=pixel_digest(source.open(locator)))
        except ImageError as error:
            yield Inspection(locator, reason=str(error))


def inspect(locator: str, data: bytes) -> Inspection:
    """Decode one image file."""
    try:
        image = decode(data)
    except ImageError as error:
        return Inspection(locator, reason=str(error))
    return Inspection(locator, odd=oddities(data), pixels=pixel_digest(image))


def pixel_digest(image: Image.Image) -> bytes:
    """Digest of what a model sees: the size and the RGB pixels."""
    hasher = xxhash.xxh3_128(repr(image.size).encode())
    hasher.update((image if image.mode == "RGB" else image.convert("RGB")).tobytes())
    return hasher.digest()
