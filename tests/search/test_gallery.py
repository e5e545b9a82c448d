import io
import shutil

import numpy as np
import pytest
import torch

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.datasets.sources import Files
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.models.registry import load_model
from dafm_ray.search.gallery import gallery_index, identity_of, index_digest
from tests.samples import image_folder, open_folder, picture, tar_shard

TINY = "clip4cir:sum@random-tiny"


@pytest.fixture
def dataset(tmp_path):
    return open_folder(image_folder(tmp_path / "images", 12, 5))


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "png")
    return buffer.getvalue()


def made(model, dataset, cache, identity="a"):
    return gallery_index(model, identity, dataset, cache and str(cache), batch=5)


def test_the_index_holds_the_gallery_in_stored_order(model, dataset):
    index, built = made(model, dataset, None)
    assert built
    assert tuple(index.ids) == dataset.gallery.ids
    images = [model.preprocess(dataset.source.open(id)) for id in dataset.gallery.locators]
    with torch.inference_mode():
        expected = model.encode_gallery(torch.stack(images)).numpy()
    np.testing.assert_allclose(index.vectors, expected, atol=1e-6)


def test_a_kept_index_is_used_without_opening_an_image(model, dataset, tmp_path, monkeypatch):
    first, _ = made(model, dataset, tmp_path / "cache")
    monkeypatch.setattr(Files, "open", None)
    again, built = made(model, dataset, tmp_path / "cache")
    assert not built
    np.testing.assert_array_equal(again.vectors, first.vectors)


def test_without_images_there_is_no_index(model, dataset, tmp_path):
    for file in (tmp_path / "images").glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"12 cannot: .*: the file is missing"):
        made(model, dataset, tmp_path / "cache")


def test_an_image_that_is_replaced_under_its_name_is_noticed(model, dataset, tmp_path):
    first, _ = made(model, dataset, tmp_path / "cache")
    one, other = tmp_path / "images" / "003.png", tmp_path / "images" / "004.png"
    content = one.read_bytes(), other.read_bytes()
    one.write_bytes(content[1])
    other.write_bytes(content[0])
    again, built = made(model, dataset, tmp_path / "cache")
    assert built
    order = list(dataset.gallery.ids)
    places = [order.index(name) for name in ("003.png", "004.png")]
    np.testing.assert_array_equal(again.vectors[places], first.vectors[places[::-1]])


def test_a_shard_that_is_replaced_under_its_name_is_noticed(model, tmp_path):
    members = [(f"{n:03d}.png", png(n)) for n in range(4)]
    tar_shard(tmp_path / "a.tar", members)
    root = image_folder(tmp_path / "images", 4, 2)
    config = DatasetConfig("folder", root=str(root), images=str(tmp_path / "a.tar"))
    assert made(model, load_dataset(config), tmp_path / "cache")[1]
    assert not made(model, load_dataset(config), tmp_path / "cache")[1]
    tar_shard(tmp_path / "a.tar", [(name, png(9 + n)) for n, (name, _) in enumerate(members)])
    assert made(model, load_dataset(config), tmp_path / "cache")[1]


def test_other_weights_another_gallery_or_folder_are_another_index(model, dataset, tmp_path):
    made(model, dataset, tmp_path / "cache")
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    picture(99).save(tmp_path / "images" / "new.png")
    more = open_folder(tmp_path / "images")
    elsewhere = open_folder(tmp_path / "copy")
    for identity, data in (("b", dataset), ("a", more), ("a", elsewhere)):
        assert made(model, data, tmp_path / "cache", identity)[1]
        assert not made(model, data, tmp_path / "cache", identity)[1]
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_folder_that_holds_another_index_is_refused(model, dataset, tmp_path):
    index, _ = made(model, dataset, None)
    folder = tmp_path / "cache" / index_digest("a", dataset)[:16]
    index.save(folder, "something else")
    with pytest.raises(DataError, match="other weights or another gallery"):
        made(model, dataset, tmp_path / "cache")
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match="delete the folder"):
        made(model, dataset, tmp_path / "cache")
    (folder / "index.json").unlink()
    assert made(model, dataset, tmp_path / "cache")[1]


def test_images_that_cannot_be_opened_are_listed_until_they_are_mended(model, tmp_path):
    root = image_folder(tmp_path / "images", 12, 5)
    for name in ("003.png", "011.png"):
        (root / name).write_bytes(b"")
    dataset = open_folder(root)
    for built in (True, False):
        index, now = made(model, dataset, tmp_path / "cache")
        assert now == built
        assert len(index) == 10
        assert dict(index.unusable) == dict.fromkeys(("003.png", "011.png"), "the file is empty")
    picture(3).save(root / "003.png")
    index, now = made(model, dataset, tmp_path / "cache")
    assert (now, len(index)) == (True, 11)
    assert [id for id, _ in index.unusable] == ["011.png"]


def test_several_vectors_a_candidate(dataset):
    model = load_model("sprc:base@random-tiny")
    index, _ = made(model, dataset, None)
    assert index.vectors.ndim == 3
    queries_QD = index.vectors[:4, 0]
    scored = model.score(torch.tensor(queries_QD), torch.tensor(index.vectors)).numpy()
    columns_QN = np.tile(np.arange(12), (4, 1))
    np.testing.assert_allclose(index.scores(queries_QD, columns_QN), scored, atol=1e-6)


def test_a_model_that_scores_otherwise_is_refused(dataset, monkeypatch):
    model = load_model(TINY)
    monkeypatch.setattr(type(model), "score", staticmethod(lambda q, n: -torch.cdist(q, n)))
    with pytest.raises(ConfigError, match="does not score by inner products"):
        made(model, dataset, None)


def test_an_identity_is_of_the_weights_not_of_their_path(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / f"{name}.pt").write_text(text)
    a, b, c = (identity_of(f"clip4cir:sum@{tmp_path / name}.pt") for name in "abc")
    assert a == b != c
