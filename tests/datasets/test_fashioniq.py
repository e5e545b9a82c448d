import json
import random

import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.fashioniq import CATEGORIES, PUBLISHED
from dafm_ray.datasets.registry import load_dataset, read_dataset
from dafm_ray.errors import ConfigError, DataError
from tests.samples import picture

VAL_SPLIT = {"dress": 2_628, "shirt": 3_089, "toptee": 2_902}
IDS = [f"B{n:03d}" for n in range(9)]


def layout(root, triplets, split="val", category="dress", suffix=".png"):
    for folder in ("captions", "image_splits", "images"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n, id in enumerate(IDS):
        picture(n).save(root / "images" / f"{id}{suffix}")
    (root / "captions" / f"cap.{category}.{split}.json").write_text(json.dumps(triplets))
    (root / "image_splits" / f"split.{category}.{split}.json").write_text(json.dumps(IDS))
    return DatasetConfig("fashioniq", split, root=str(root), category=category)


def triplet(candidate, target, *captions):
    return {"candidate": candidate, "target": target, "captions": list(captions)}


TRIPLETS = [
    triplet("B000", "B001", "is red", "has sleeves"),
    triplet("B000", "B001", "is blue", ""),
    triplet("B000", "B002", "is longer", "is darker"),
    triplet("B003", "B004", "no belt", "shorter"),
]


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_published_annotations_have_their_sizes(reference_material, category, split):
    folder = str(reference_material / "data" / "fashioniq")
    config = DatasetConfig("fashioniq", split, annotations=folder, category=category)
    dataset = read_dataset(config).dataset()
    assert (len(dataset.gallery), len(dataset.queries)) == PUBLISHED[split, category]
    assert (dataset.protocol, dataset.policy) == ("fashioniq", "keep")
    assert {query.category for query in dataset.queries} == {category}
    assert not any(query.excluded for query in dataset.queries)
    assert all(bool(query.targets) == (split != "test") for query in dataset.queries)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_val_split_gallery_is_another_protocol(reference_material, category):
    folder = str(reference_material / "data" / "fashioniq")
    config = DatasetConfig(
        "fashioniq", "val", annotations=folder, category=category, gallery="val-split"
    )
    dataset = read_dataset(config).dataset()
    assert dataset.protocol == "fashioniq-val-split"
    assert len(dataset.gallery) == VAL_SPLIT[category]


def test_ids_do_not_depend_on_the_order_of_the_file(tmp_path):
    shuffled = random.Random(1).sample(TRIPLETS, len(TRIPLETS))
    one = load_dataset(layout(tmp_path / "a", TRIPLETS))
    other = load_dataset(layout(tmp_path / "b", shuffled))
    assert one.queries == other.queries
    assert sorted(query.id for query in one.queries) == [
        "dress/B000/B001#1",
        "dress/B000/B001#2",
        "dress/B000/B002",
        "dress/B003/B004",
    ]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPG"])
def test_images_are_found_whatever_their_suffix(tmp_path, suffix):
    dataset = load_dataset(layout(tmp_path, TRIPLETS, suffix=suffix))
    assert all(place.endswith(suffix) for place in dataset.gallery.locators)
    assert dataset.source.open(dataset.gallery.locators[0]).size == (40, 32)


def test_test_has_no_targets_and_so_no_val_split(tmp_path):
    unlabelled = [{"candidate": "B000", "captions": ["a", "b"]}]
    config = layout(tmp_path, unlabelled, split="test")
    assert load_dataset(config).queries[0].targets == ()
    reduced = DatasetConfig(
        "fashioniq", "test", root=config.root, category="dress", gallery="val-split"
    )
    with pytest.raises(DataError, match="holds no targets"):
        load_dataset(reduced)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"candidate": "B000", "target": "B001"}, "'captions' is missing"),
        ({"candidate": "B000", "target": "B001", "captions": []}, "'captions' is empty"),
        ({"target": "B001", "captions": ["a"]}, "'candidate' is missing"),
        (triplet("B000", "B999", "a"), "'B999', which is not in the gallery"),
    ],
)
def test_a_wrong_triplet_is_named(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        load_dataset(layout(tmp_path, [wrong]))


def test_wrong_categories_name_the_nearest(tmp_path):
    config = layout(tmp_path, TRIPLETS)
    wrong = DatasetConfig("fashioniq", "val", root=config.root, category="dres")
    with pytest.raises(ConfigError, match="did you mean 'dress'"):
        load_dataset(wrong)
    with pytest.raises(ConfigError, match=r"set dataset\.category"):
        load_dataset(DatasetConfig("fashioniq", "val", root=config.root))
    with pytest.raises(ConfigError, match=r"dataset\.category says nothing about cirr"):
        load_dataset(DatasetConfig("cirr", "val", root=config.root, category="dress"))
