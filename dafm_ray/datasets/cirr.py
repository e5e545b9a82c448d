"""CIRR (rc2): open-domain photos in sets of six, as its authors distribute it.

    {annotations}/captions/cap.rc2.{train,val,test1}.json
    {annotations}/image_splits/split.rc2.{train,val,test1}.json    name -> path below the root
    {root}/{train/0..99,dev,test1}/NAME.png

The annotations lie in the root itself or in `cirr/` below it unless another folder is named.
Protocol: all images of the split, the reference taken out; subset recall over the `img_set`.
Source: Liu et al., ICCV 2021, and the files of its branch `cirr_dataset`.
"""

from typing import Any

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.annotations import (
    annotations_below,
    place_of,
    read_entries,
    read_json,
    take,
    texts,
)
from dafm_ray.datasets.base import Draft, Query, exclude_reference
from dafm_ray.datasets.sources import image_files
from dafm_ray.errors import ConfigError, DataError, unknown

SPLITS = ("train", "val", "test1")
GROUP_SIZE = 6
EMPTY_CAPTIONS = {("test1", ""): 1}
"""(split, "") -> captions that are published empty."""

PUBLISHED = {
    ("train", ""): (16_939, 28_225),
    ("val", ""): (2_297, 4_181),
    ("test1", ""): (2_315, 4_148),
}
"""(split, "") -> images and queries as its authors count them."""


def read_cirr(config: DatasetConfig) -> Draft:
    """Read one split; test1 has no targets, so its queries are ranked and not counted.

    Raises:
        ConfigError: no such split.
        DataError: a file is missing or is not what it should be.
    """
    if config.split not in SPLITS:
        raise ConfigError(unknown("split of cirr", config.split, SPLITS))
    listed = f"image_splits/split.rc2.{config.split}.json"
    folder = annotations_below(config, "cirr", listed)
    places, where = read_json(folder, listed, dict), place_of(folder, listed)
    if "" in texts(list(places.values()), "the path of an image", where):
        raise DataError(f"{where}: the path of an image is empty")
    queries, problems = read_entries(folder, f"captions/cap.rc2.{config.split}.json", _query)
    return Draft(
        name="cirr",
        split=config.split,
        protocol="cirr",
        policy="mask",
        images=tuple((name, path.removeprefix("./")) for name, path in places.items()),
        queries=queries,
        source=image_files(config.root),
        problems=problems,
    )


def _caption(entry: Any, where: str) -> str:
    """The text; it may be empty, as one of the published captions is."""
    caption = entry.get("caption")
    if not isinstance(caption, str):
        raise DataError(f"{where}: 'caption' must be text, found {caption!r}")
    return caption


def _query(entry: Any, where: str) -> Query:
    reference = take(entry, "reference", str, where)
    img_set = take(entry, "img_set", dict, where)
    labelled = "target_hard" in entry
    return Query(
        id=str(take(entry, "pairid", int, where)),
        reference=reference,
        captions=(_caption(entry, where),),
        targets=(take(entry, "target_hard", str, where),) if labelled else (),
        excluded=exclude_reference(reference, "mask"),
        group=texts(img_set.get("members"), "img_set.members", where),
        fold_group=str(img_set.get("id", "")),
    )
