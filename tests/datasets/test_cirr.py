import json

import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.cirr import PUBLISHED
from dafm_ray.datasets.registry import load_dataset, read_dataset
from dafm_ray.errors import ConfigError, DataError
from tests.samples import picture

NAMES = [f"dev-{n}-0-img{n % 2}" for n in range(8)]


def entry(n: int, **changes: object) -> dict[str, object]:
    members = [NAMES[(n + k) % 8] for k in range(6)]
    return {
        "pairid": 100 + n,
        "reference": members[0],
        "target_hard": members[2],
        "target_soft": {members[2]: 1.0},
        "caption": f"change {n}",
        "img_set": {"id": n // 2, "members": members},
        **changes,
    }


def layout(root, entries=None, places=None, below="."):
    (root / "dev").mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(NAMES):
        picture(n).save(root / "dev" / f"{name}.png")
    for folder in ("captions", "image_splits"):
        (root / below / folder).mkdir(parents=True, exist_ok=True)
    entries = [entry(n) for n in range(5)] if entries is None else entries
    places = places or {name: f"./dev/{name}.png" for name in NAMES}
    captions = root / below / "captions" / "cap.rc2.val.json"
    captions.write_text(json.dumps(entries))
    (root / below / "image_splits" / "split.rc2.val.json").write_text(json.dumps(places))
    return DatasetConfig("cirr", "val", root=str(root))


@pytest.mark.parametrize("split", ["val", "test1"])
def test_the_published_annotations_have_their_sizes(reference_material, split):
    folder = str(reference_material / "data" / "cirr")
    dataset = read_dataset(DatasetConfig("cirr", split, annotations=folder)).dataset()
    assert (len(dataset.gallery), len(dataset.queries)) == PUBLISHED[split, ""]
    assert (dataset.protocol, dataset.policy) == ("cirr", "mask")
    assert all(len(query.group) == 6 for query in dataset.queries)
    assert all(query.excluded == (query.reference,) for query in dataset.queries)
    assert all(bool(query.targets) == (split == "val") for query in dataset.queries)
    assert all(query.fold_group for query in dataset.queries)


@pytest.mark.parametrize("below", [".", "cirr"])
def test_both_layouts_on_disk_are_read(tmp_path, below):
    dataset = load_dataset(layout(tmp_path, below=below))
    query = next(query for query in dataset.queries if query.id == "103")
    assert query.reference == NAMES[3]
    assert query.targets == (NAMES[5],)
    assert query.captions == ("change 3",)
    assert query.fold_group == "1"
    position = dataset.gallery.position(query.reference)
    assert dataset.source.open(dataset.gallery.locators[position]).size == (40, 32)


def test_an_empty_caption_is_part_of_the_published_data(tmp_path):
    dataset = load_dataset(layout(tmp_path, [entry(0, caption="")]))
    assert dataset.queries[0].captions == ("",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairid": "x"}, "entry 0: 'pairid' must be a whole number"),
        ({"reference": ""}, "entry 0: 'reference' must be text"),
        ({"caption": None}, "entry 0: 'caption' must be text, found None"),
        ({"img_set": {"members": "a"}}, r"'img_set\.members' must be a list"),
        ({"reference": "dev-9"}, "'dev-9', which is not in the gallery"),
        ({"target_hard": "dev-9"}, "'dev-9', which is not in the gallery"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_dataset(layout(tmp_path, [entry(0, **changes)]))


def test_a_pair_id_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="query id '100' stands twice"):
        load_dataset(layout(tmp_path, [entry(0), entry(0)]))


def test_missing_files_and_wrong_splits(tmp_path):
    config = layout(tmp_path)
    with pytest.raises(ConfigError, match="no split of cirr 'dev'"):
        load_dataset(DatasetConfig("cirr", "dev", root=config.root))
    with pytest.raises(DataError, match=r"no image_splits/split\.rc2\.test1\.json in"):
        load_dataset(DatasetConfig("cirr", "test1", root=config.root))
    (tmp_path / "captions" / "cap.rc2.val.json").unlink()
    with pytest.raises(DataError, match=r"cap\.rc2\.val\.json, so there are no queries"):
        load_dataset(config)


def test_a_missing_image_folder_is_one_message(tmp_path):
    config = layout(tmp_path, places={name: f"./images/{name}.png" for name in NAMES})
    with pytest.raises(DataError, match=r"the image folder .*images is missing"):
        load_dataset(config)


def test_annotations_alone_are_enough_to_read_but_not_to_run(tmp_path):
    root = layout(tmp_path).root
    alone = DatasetConfig("cirr", "val", annotations=root)
    assert len(read_dataset(alone).dataset().queries) == 5
    with pytest.raises(ConfigError, match=r"set dataset\.root"):
        load_dataset(alone)
