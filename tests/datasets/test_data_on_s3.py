"""Annotations and plain image files behind a URI."""

import pickle
from dataclasses import replace

import pyarrow as pa
import pytest

from dafm_ray import remote
from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import label_of
from dafm_ray.datasets.check import check
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset, read_dataset
from dafm_ray.datasets.sources import image_files
from dafm_ray.errors import DataError, MachineError
from dafm_ray.remote import Backoff
from dafm_ray.search.gallery import index_digest
from dafm_ray.storage import open_storage
from tests.datasets.test_cirr import NAMES
from tests.datasets.test_cirr import layout as cirr_layout
from tests.datasets.test_fashioniq import TRIPLETS
from tests.datasets.test_fashioniq import layout as fashioniq_layout
from tests.object_store import every
from tests.samples import image_folder, tar_shard, upload


def cirr(root):
    return cirr_layout(root, below="cirr")


def fashioniq(root):
    config = fashioniq_layout(root, TRIPLETS, suffix=".JPG")
    (root / "images" / "deep").mkdir()
    (root / "images" / "deep" / "B000.png").write_bytes(b"is not in images/ itself")
    return config


def folder(root):
    image_folder(root / "deep", images=7, queries=0)
    (root / "deep" / "queries.jsonl").rename(root / "ignored.txt")
    return DatasetConfig("folder", root=str(image_folder(root, images=9, queries=4)))


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", Backoff(sleep=lambda seconds: None))


@pytest.mark.parametrize("layout", [cirr, fashioniq, folder])
@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_a_data_set_at_a_uri_is_the_data_set_on_disk(
    layout, scheme, object_store, tmp_path, no_waiting
):
    """One request of three fails."""
    config = layout(tmp_path / "own")
    uri = object_store.uri("own") if scheme == "s3" else f"memory://{tmp_path}/own"
    upload(tmp_path / "own", uri)
    object_store.fault = every(3, 500)
    there = replace(config, root=uri)
    draft, local = read_dataset(there), read_dataset(config)
    assert replace(draft, source=local.source) == local
    one, other = load_dataset(there), load_dataset(config)
    assert one.gallery == other.gallery
    assert one.queries_digest == other.queries_digest
    source = pickle.loads(pickle.dumps(one.source))
    for locator in one.gallery.locators:
        assert source.read(locator) == other.source.read(locator)
    assert source.open(one.gallery.locators[0]).size == (40, 32)
    assert bool(object_store.faults) == (scheme == "s3")


def test_annotations_alone_may_lie_at_a_uri_and_images_in_shards(bucket, tmp_path):
    config = cirr_layout(tmp_path / "own")
    members = [(p.name, p.read_bytes()) for p in sorted((tmp_path / "own" / "dev").iterdir())]
    tar_shard(tmp_path / "x.tar", members)
    upload(tmp_path / "own", bucket)
    split = DatasetConfig("cirr", "val", annotations=bucket)
    assert read_dataset(split).queries == read_dataset(config).queries
    sharded = load_dataset(replace(split, images=str(tmp_path / "x.tar")))
    assert sharded.source.open(sharded.gallery.locators[0]).size == (40, 32)


def test_a_request_that_fails_is_no_fault_of_the_image(bucket, object_store, tmp_path, no_waiting):
    source = image_files(upload(image_folder(tmp_path / "own", images=1, queries=1), bucket))
    data = (tmp_path / "own" / "000.png").read_bytes()
    before = len(object_store.requests)
    assert source.read("./000.png") == data
    assert len(object_store.requests) == before + 2  # its size, then its bytes
    with pytest.raises(ImageError, match="the file is missing"):
        source.open("001.png")
    for locator in ("../own/000.png", "/000.png", "a/../000.png"):
        with pytest.raises(ImageError, match=r"the path .* leaves s3://stores/"):
            source.open(locator)
    with pytest.raises(ImageError, match="is not a path"):
        source.open("000.png\0")
    object_store.fault = every(1, 503)
    with pytest.raises(MachineError, match="failed 7 times"):
        source.open("000.png")
    object_store.fault = every(1, 403)
    with pytest.raises(MachineError, match="access denied"):
        source.open("000.png")


@pytest.mark.parametrize(
    ("name", "key"), [("cirr", "root"), ("fashioniq", "annotations"), ("folder", "root")]
)
@pytest.mark.parametrize(
    ("fault", "message"),
    [(None, "there is no such bucket"), (403, "access denied"), (503, "failed 7 times")],
)
def test_a_server_that_refuses_is_one_message(
    object_store, name, key, fault, message, no_waiting, capsys
):
    bucket = "stores" if fault else "nowhere"
    object_store.fault = every(1, fault)
    uri = object_store.uri("own", bucket)
    assert main(["data", "check", name, f"--{key}", uri]) == 5
    said = capsys.readouterr().err
    assert message in said
    assert f"s3://{bucket}/own" in said
    assert "testing" not in said
    assert "Traceback" not in said


def test_what_is_missing_is_named_without_credentials(object_store, tmp_path):
    own = upload(image_folder(tmp_path / "own", images=2, queries=0), object_store.uri("own"))
    open_storage(own).delete("queries.jsonl")
    config = cirr_layout(tmp_path / "cirr")
    (tmp_path / "cirr" / "captions" / "cap.rc2.val.json").write_text("[{}]")
    there = replace(config, root=upload(tmp_path / "cirr", object_store.uri("cirr")))
    for dataset, message in (
        (DatasetConfig("folder", root=object_store.uri("no")), r"no folder 's3://stores/no\?"),
        (DatasetConfig("folder", root=own), r"^s3://stores/own\?\S+ holds no queries\.jsonl"),
        (replace(there, split="test1"), r"split\.rc2\.test1\.json in s3://stores/cirr\?"),
        (there, r"^s3://stores/cirr/captions/cap\.rc2\.val\.json\?\S+, entry 0: 'reference' is"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            load_dataset(dataset)
        assert "testing" not in str(raised.value)
    open_storage(there.root).delete("captions/cap.rc2.val.json")
    with pytest.raises(DataError, match=r"cap\.rc2\.val\.json\?\S+, so there are no queries"):
        load_dataset(there)
    cirr_layout(tmp_path / "cirr", places={name: f"img/{name}.png" for name in NAMES})
    upload(tmp_path / "cirr", there.root)
    with pytest.raises(DataError, match=r"image folder s3://stores/cirr/img\?\S+ is missing"):
        load_dataset(there)
    assert label_of("folder", "own", "", own).startswith("folder own s3://stores/own?")


def test_the_files_of_a_gallery_are_known_by_one_listing(object_store, tmp_path):
    root = upload(image_folder(tmp_path / "own", images=9, queries=2), object_store.uri("own"))
    dataset = load_dataset(DatasetConfig("folder", root=root))
    before = len(object_store.requests)
    made = index_digest("a", dataset)
    assert len(object_store.requests) == before + 1
    assert index_digest("a", dataset) == made
    open_storage(root).write("003.png", pa.py_buffer(b"another image"))
    assert index_digest("a", dataset) != made
    assert dataset.source.versions(["./003.png", "missing.png"])[1] == ""


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(120)
def test_a_check_finds_the_same(object_store, tmp_path):
    root = image_folder(tmp_path / "own", images=6, queries=4)
    (root / "empty.png").write_bytes(b"")
    (root / "gallery.txt").write_text("".join(f"{n:03d}.png\n" for n in range(8)) + "empty.png\n")
    local = check(DatasetConfig("folder", root=str(root)))
    there = check(DatasetConfig("folder", root=upload(root, object_store.uri("own"))))
    unusable = {f.item for f in local.findings if f.check == "unusable image"}
    assert unusable == {"006.png", "007.png", "empty.png"}
    assert there.findings == local.findings
    assert there.images_checked == local.images_checked == 9
