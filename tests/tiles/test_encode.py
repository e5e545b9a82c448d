import numpy as np
import pytest

from dafm_ray.config import ModelConfig
from dafm_ray.tiles import encode
from dafm_ray.tiles.encode import Decoder, Encoder, Usable, plan_units
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import TileStore, feature_key
from dafm_ray.tiles.transit import arrived, pack
from tests.samples import image_folder, open_folder

POOL = ModelConfig("sum", "clip4cir:sum@random-tiny", batch=4, precision="fp32")


def encoded(folder, dataset):
    """The features of every unit, and what of its images travelled."""
    entries = {"sum": ModelEntry(POOL.id, "d", 4, "fp32")}
    spec = {"name": "folder", "split": "", "root": ""}
    store = TileStore.create(str(folder), dataset, spec, entries, Grid(8, 8, 8), "float32")
    decode = Decoder([(store, dataset.source)])
    finish = Encoder([(store, dataset.source)], POOL, last=True)
    kinds = []
    for unit in plan_units(0, store, dataset, ["sum"]):
        table = decode(pack(unit))
        kinds.append([type(image).__name__ for image in arrived(table).images])
        assert arrived(finish(table)).blocks == 1
    keys = [
        feature_key("sum", role, n) for role, n in (("gallery", 0), ("gallery", 2), ("queries", 1))
    ]
    return {key: store.read(key) for key in keys}, kinds, store.failures()


def test_images_beyond_the_bound_travel_by_name_and_give_the_same_features(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images", images=20, queries=13)
    (root / "007.png").write_bytes(b"no image")
    dataset = open_folder(root)
    with_pixels, kinds, failures = encoded(tmp_path / "a", dataset)
    assert {kind for unit in kinds for kind in unit} == {"Image", "str"}
    monkeypatch.setattr(encode, "UNIT_BYTES", 3 * 3 * 40 * 32)
    by_name, kinds, failures_again = encoded(tmp_path / "b", dataset)
    assert failures_again == failures
    for unit in kinds:
        assert unit.count("Image") == min(3, len(unit) - unit.count("str"))
        assert Usable.__name__ in unit or len(unit) <= 4
    for key, features in with_pixels.items():
        assert np.array_equal(features, by_name[key], equal_nan=True), key


@pytest.mark.parametrize("actors", [1, 3])
def test_decoders_always_find_a_cpu(actors):
    pools = [ModelConfig("a", POOL.id, actors=actors), ModelConfig("b", POOL.id)]
    share = encode.actor_cpus(4, pools)
    assert share * (actors + 1) <= 4 - encode.DECODE_CPUS
