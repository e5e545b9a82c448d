import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.datasets.shards import open_shards
from dafm_ray.errors import ConfigError, DataError
from tests.datasets.test_cirr import NAMES
from tests.datasets.test_cirr import layout as cirr_layout
from tests.samples import image_folder, parquet_shard, tar_shard


@pytest.fixture
def root(tmp_path):
    return image_folder(tmp_path / "own", images=12, queries=6)


def files(root):
    return [(path.name, path.read_bytes()) for path in sorted(root.glob("*.png"))]


def shards(kind, root, folder):
    folder.mkdir()
    listed = files(root)[::-1]
    for n in range(2):
        if kind == "tar":
            tar_shard(folder / f"{n}.tar", listed[n::2])
        else:
            parquet_shard(folder / f"{n}.parquet", listed[n::2], row_group_size=4)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_hold_the_same_data_set_as_files(tmp_path, root, kind):
    shards(kind, root, tmp_path / "shards")
    alone = tmp_path / "queries"
    alone.mkdir()
    (alone / "queries.jsonl").write_bytes((root / "queries.jsonl").read_bytes())
    plain = load_dataset(DatasetConfig("folder", root=str(root)))
    for where in ("shards", f"shards/*.{kind}"):
        images = str(tmp_path / where)
        sharded = load_dataset(DatasetConfig("folder", root=str(alone), images=images))
        assert sharded.gallery.digest == plain.gallery.digest
        assert sharded.queries_digest == plain.queries_digest
        for n, id in enumerate(plain.gallery.ids):
            image = sharded.source.open(sharded.gallery.locators[n])
            assert np.array_equal(np.asarray(image), np.asarray(plain.source.open(id)))


def test_ids_of_annotations_are_found_by_file_name(tmp_path):
    config = cirr_layout(tmp_path / "cirr")
    members = [(f"dev/{p.name}", p.read_bytes()) for p in (tmp_path / "cirr/dev").iterdir()]
    tar_shard(tmp_path / "x.tar", [*members[1:], ("notes/readme.txt", b"no image")])
    lost = members[0][0].removeprefix("dev/").removesuffix(".png")
    dataset = load_dataset(
        DatasetConfig("cirr", "val", annotations=config.root, images=str(tmp_path / "x.tar"))
    )
    for id in NAMES:
        locator = dataset.gallery.locators[dataset.gallery.position(id)]
        if id == lost:
            with pytest.raises(ImageError, match="no shard holds it"):
                dataset.source.open(locator)
        else:
            assert dataset.source.open(locator).size == (40, 32)


def test_one_file_name_in_two_folders_is_refused(tmp_path):
    config = cirr_layout(tmp_path / "cirr")
    data = (tmp_path / "cirr/dev" / f"{NAMES[0]}.png").read_bytes()
    tar_shard(tmp_path / "x.tar", [(f"{size}/{NAMES[0]}.png", data) for size in ("big", "small")])
    with pytest.raises(DataError, match=r"may be 'big/.*' or 'small/"):
        load_dataset(
            DatasetConfig("cirr", "val", annotations=config.root, images=str(tmp_path / "x.tar"))
        )


@pytest.mark.parametrize(
    "ids", [pa.array(["a", None]), pa.array([0.0, 1.0]), pa.array([b"a", b"b"])]
)
def test_odd_ids_of_parquet_are_refused(tmp_path, ids):
    pq.write_table(pa.table({"id": ids, "image": [b"x", b"y"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"must have the columns|rows without"):
        open_shards(str(tmp_path / "x.parquet"))


def test_shards_in_folders_below_are_found_and_compressed_tars_are_named(tmp_path, root):
    (tmp_path / "s" / "deep").mkdir(parents=True)
    tar_shard(tmp_path / "s" / "deep" / "a.tar", files(root)[:2])
    assert len(open_shards(str(tmp_path / "s"))[1]) == 2
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ConfigError, match="is no shard"):
        open_shards(str(tmp_path / "a.tar.gz"))


def test_parquet_holds_bytes_or_the_struct_of_hugging_face(tmp_path, root):
    ids, data = zip(*files(root)[:3], strict=True)
    structs = [{"bytes": image, "path": id} for id, image in zip(ids, data, strict=True)]
    pq.write_table(pa.table({"id": ids, "image": structs}), tmp_path / "a.parquet")
    source, places = open_shards(str(tmp_path / "a.parquet"))
    assert [source.read(place) for place in places.values()] == list(data)


def test_numbers_are_ids_and_empty_values_are_unusable_images(tmp_path):
    table = pa.table({"id": [7, 8], "image": pa.array([None, b""], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    source, places = open_shards(str(tmp_path / "a.parquet"))
    assert list(places) == ["7", "8"]
    for place in places.values():
        with pytest.raises(ImageError, match="empty"):
            source.open(place)


def test_a_truncated_shard_is_a_reason_not_a_crash(tmp_path, root):
    tar_shard(tmp_path / "a.tar", files(root))
    source, places = open_shards(str(tmp_path / "a.tar"))
    data = (tmp_path / "a.tar").read_bytes()
    offset = int(places["011.png"].split(":")[1])
    (tmp_path / "a.tar").write_bytes(data[: offset + 10])
    with pytest.raises(ImageError, match="ends inside this image"):
        source.open(places["011.png"])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        source.open(places["000.png"])


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/hostname"
        tar.addfile(link)
        plain = tarfile.TarInfo("../outside.png")
        plain.size = 3
        tar.addfile(plain, io.BytesIO(b"abc"))
    _, places = open_shards(str(tmp_path / "a.tar"))
    assert list(places) == ["../outside.png"]


def test_unusable_shards_are_named(tmp_path, root):
    with pytest.raises(ConfigError, match="holds no shards"):
        open_shards(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="cannot open"):
        open_shards("nosuch://bucket/x.tar")
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match="uncompressed tar"):
        open_shards(str(tmp_path / "a.tar"))
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        open_shards(str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match="tar and Parquet"):
        open_shards(str(tmp_path))
    pq.write_table(pa.table({"id": ["a"], "picture": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"found id \(string\), picture"):
        open_shards(str(tmp_path / "a.parquet"))
    twice = files(root)[:1] * 2
    tar_shard(tmp_path / "a.tar", twice)
    with pytest.raises(DataError, match=r"'000\.png' stands twice"):
        open_shards(str(tmp_path / "a.tar"))
