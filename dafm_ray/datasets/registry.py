"""Opening a data set by name. A new one is a file and a row here."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets import cirr, fashioniq, icons
from dafm_ray.datasets.annotations import place_of
from dafm_ray.datasets.base import Dataset, Draft
from dafm_ray.datasets.folder import read_folder
from dafm_ray.datasets.shards import Shards, open_shards, stored_in
from dafm_ray.datasets.sources import ImageFiles, leaves
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.storage import open_storage


@dataclass(frozen=True)
class Entry:
    """How a data set is read.

    Attributes:
        read: its reader.
        keys: fields of the configuration it understands beside its name.
        splits: its splits.
        categories: its categories.
        published: (split, category) -> images and queries as its authors count them.
        empty_captions: (split, category) -> captions that are published empty.
        group_size: members of every query's group, if the protocol says so.
        unlabelled: splits whose targets are not published.
    """

    read: Callable[[DatasetConfig], Draft]
    keys: frozenset[str]
    splits: tuple[str, ...] = ("",)
    categories: tuple[str, ...] = ("",)
    published: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    empty_captions: dict[tuple[str, str], int] = field(default_factory=dict)
    group_size: int = 0
    unlabelled: tuple[str, ...] = ()


PLACES = frozenset({"root", "images"})

DATASETS = {
    "icons": Entry(icons.read_icons, frozenset({"split"}), icons.SPLITS),
    "icon-names": Entry(icons.read_icon_names, frozenset({"split"}), icons.SPLITS),
    "cirr": Entry(
        cirr.read_cirr,
        PLACES | {"split", "annotations"},
        cirr.SPLITS,
        published=cirr.PUBLISHED,
        empty_captions=cirr.EMPTY_CAPTIONS,
        group_size=cirr.GROUP_SIZE,
        unlabelled=("test1",),
    ),
    "fashioniq": Entry(
        fashioniq.read_fashioniq,
        PLACES | {"split", "annotations", "category", "gallery"},
        fashioniq.SPLITS,
        fashioniq.CATEGORIES,
        fashioniq.PUBLISHED,
        fashioniq.EMPTY_CAPTIONS,
        unlabelled=("test",),
    ),
    "folder": Entry(read_folder, PLACES),
}


def load_dataset(config: DatasetConfig) -> Dataset:
    """Open a data set with its images.

    Raises:
        ConfigError: no such data set, split or category; names the nearest.
        DataError: its files or its images are missing, or do not fit together.
    """
    draft = read_dataset(config)
    missing = missing_folder(draft)
    if missing is not None:
        raise DataError(f"the image folder {missing} is missing; set dataset.root to its parent")
    return draft.dataset()


def read_dataset(config: DatasetConfig, shards: Shards | None = None) -> Draft:
    """Read the files of a data set; its images need not be there.

    Args:
        config: which data set.
        shards: what `config.images` names, if it is open already.

    Raises:
        ConfigError: no such data set, or a key that says nothing about it.
        DataError: a file is missing or is not what it should be.
    """
    entry = dataset_entry(config.name)
    for key in fields(config):
        given = getattr(config, key.name) != key.default
        if key.name != "name" and given and key.name not in entry.keys:
            raise ConfigError(f"dataset.{key.name} says nothing about {config.name}; leave it out")
    if not config.images:
        return entry.read(config)
    source, places = shards or open_shards(config.images)
    if config.name == "folder":
        return stored_in(read_folder(config, list(places)), source, places)
    return stored_in(entry.read(config), source, places)


def dataset_entry(name: str) -> Entry:
    """The row of a data set.

    Raises:
        ConfigError: no such data set; names the nearest.
    """
    if name not in DATASETS:
        raise ConfigError(unknown("data set", name, DATASETS))
    return DATASETS[name]


def missing_folder(draft: Draft) -> str | None:
    """The folder that should hold the images, for messages, if none of them has its folder.

    Raises:
        ConfigError: no root is named.
        MachineError: there is no such bucket, or its server refuses or does not answer.
    """
    if not isinstance(draft.source, ImageFiles):
        return None
    if not draft.source.root:
        raise ConfigError("set dataset.root to the folder of images")
    root = open_storage(draft.source.root)
    inside = (PurePosixPath(locator) for _, locator in draft.images if not leaves(locator))
    folders = sorted({"/".join(path.parts[:-1]) for path in inside})
    if not folders or any(map(root.has_folder, folders)):
        return None
    return place_of(root, folders[0])
