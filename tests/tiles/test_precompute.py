import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dafm_ray.config import DatasetConfig, ModelConfig, PrecomputeConfig, load_config
from dafm_ray.datasets.base import Dataset, Gallery
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.fusion.rank import rank_systems, singles
from dafm_ray.models.registry import load_model
from dafm_ray.progress import progress
from dafm_ray.tiles.encode import actor_cpus
from dafm_ray.tiles.precompute import precompute, precompute_together
from dafm_ray.tiles.store import TileStore
from tests.samples import image_folder, open_folder

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(150)]

MODELS = (
    ModelConfig("sum", "clip4cir:sum@random-tiny"),
    ModelConfig("text", "zeroshot:text@random-tiny"),
)


def config_of(folder):
    root = image_folder(folder / "images", images=22, queries=13)
    return PrecomputeConfig(
        dataset=DatasetConfig("folder", root=str(root)),
        models=MODELS,
        store=str(folder / "store"),
        encode_block=8,
        tile_queries=5,
        tile_candidates=9,
    )


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path)


@pytest.fixture(scope="module")
def first(tmp_path_factory, local_ray):
    """A finished run, which no test changes."""
    config = config_of(tmp_path_factory.mktemp("first"))
    return config, precompute(config)


@pytest.fixture
def copied(first, config):
    """A copy of that run beside images of its own."""
    shutil.copytree(first[0].store, config.store)
    return config


def hits(store: TileStore) -> list[list[int]]:
    with progress("test", 1) as shown:
        ranked = rank_systems(store, singles(store), protocol("folder"), shown)
    return [system.ranks.stored.tolist() for system in ranked]


def whole(store: TileStore, model: str) -> np.ndarray:
    return np.concatenate([store.scores(model, q) for q in range(len(store.tile_rows))])


def test_scores_equal_the_model_in_a_bare_loop(first):
    config, store = first[0], first[1].store
    dataset = open_folder(config.dataset.root)
    model = load_model(MODELS[0].id)

    def images(ids):
        return torch.stack([model.preprocess(dataset.source.open(id)) for id in ids])

    with torch.inference_mode():
        gallery = model.encode_gallery(images(dataset.gallery.ids))
        queries = model.encode_queries(
            images([query.reference for query in dataset.queries]),
            torch.arange(len(dataset.queries)),
            [model.caption(query.captions) for query in dataset.queries],
        )
        expected = model.score(queries, gallery).numpy()
    assert np.allclose(whole(store, "sum"), expected, atol=1e-5)
    assert load_config(PrecomputeConfig, f"{config.store}/config.yaml") == config
    assert all(problem == "" for _, problem in store.verify())


def test_a_second_run_computes_nothing_and_a_lost_tile_alone_is_made_again(first, copied):
    assert first[1].blocks == 2 * (3 + 2) + 2 * (3 * 3)
    again = precompute(copied)
    assert again.blocks == 0
    before = whole(again.store, "sum")
    [record] = [p for p in again.store.storage.list("records") if "scores/sum/00001-00001" in p]
    again.store.storage.delete(record)
    mended = precompute(copied)
    assert mended.blocks == 1
    assert np.array_equal(whole(mended.store, "sum"), before)


def test_bits_do_not_depend_on_actors_or_tiles_and_hits_not_on_the_source(first, tmp_path):
    config, one = first[0], first[1].store
    two_actors = tuple(replace(model, actors=2) for model in MODELS)
    other = replace(
        config,
        models=two_actors,
        store=str(tmp_path / "other"),
        tile_queries=13,
        tile_candidates=22,
    )
    two = precompute(other).store
    for name in one.models:
        assert np.array_equal(whole(one, name), whole(two, name))
    dataset = open_folder(config.dataset.root)
    shuffled = reordered(dataset)
    assert shuffled.gallery.source_order != dataset.gallery.source_order
    alone = replace(config, models=MODELS[:1], store=str(tmp_path / "third"))
    third = precompute(alone, shuffled).store
    assert hits(one) == hits(two)
    assert hits(one.of(["sum"])) == hits(third)


def reordered(dataset: Dataset) -> Dataset:
    ids = np.random.default_rng(3).permutation(dataset.gallery.ids).tolist()
    queries = tuple(reversed(dataset.queries))
    return replace(dataset, gallery=Gallery.from_source({id: id for id in ids}), queries=queries)


def test_unusable_images_are_listed_and_the_rest_goes_on(config, tmp_path):
    root = tmp_path / "images"
    (root / "000.png").write_bytes(b"")
    (root / "015.png").write_bytes(b"<html>404</html>")
    outcome = precompute(config)
    listed = {(failure.role, failure.id): failure.reason for failure in outcome.failures}
    assert listed[("gallery", "000.png")] == "the file is empty"
    assert "not an image" in listed[("gallery", "015.png")]
    assert {id for role, id in listed if role == "queries"} == {"q0", "q1"}
    table = (tmp_path / "store" / "quarantine.csv").read_text().splitlines()
    assert table[0] == "role,id,reason"
    assert len(table) == 5
    store = outcome.store
    scores = whole(store, "sum")
    column = store.positions["015.png"]
    assert np.isnan(scores[:, column]).all()
    ids = [query.id for query in store.queries]
    assert np.isnan(scores[[ids.index("q0"), ids.index("q1")]]).all()
    assert np.isfinite(scores[ids.index("q2")]).sum() == 20
    assert np.isfinite(whole(store, "text")[ids.index("q0")]).sum() == 20


def test_a_repaired_image_is_used_by_the_next_run(first, config, tmp_path):
    whole_store = first[1].store
    good = (tmp_path / "images" / "000.png").read_bytes()
    (tmp_path / "images" / "000.png").write_bytes(b"")
    assert len(precompute(config).failures) == 3
    (tmp_path / "images" / "000.png").write_bytes(good)
    mended = precompute(config)
    assert mended.failures == []
    assert not (tmp_path / "store" / "quarantine.csv").exists()
    for name in mended.store.models:
        assert np.array_equal(whole(mended.store, name), whole(whole_store, name))


def test_a_block_of_unusable_images_alone_is_quarantined(config, tmp_path):
    (tmp_path / "images" / "000.png").write_bytes(b"")
    outcome = precompute(replace(config, models=MODELS[:1], encode_block=1))
    assert len(outcome.failures) == 3
    assert outcome.store.missing() == []


def test_another_gallery_or_other_weights_are_refused(copied, tmp_path):
    config = copied
    with pytest.raises(DataError, match="other weights"):
        precompute(replace(config, models=(ModelConfig("sum", "clip4cir:sum@random"),)))
    (tmp_path / "images" / "000.png").unlink()
    (tmp_path / "images" / "gallery.txt").write_text("".join(f"{n:03d}.png\n" for n in range(21)))
    with pytest.raises(DataError, match="another gallery"):
        precompute(config)


def test_float16_tiles(config):
    store = precompute(replace(config, models=MODELS[:1], score_type="float16")).store
    assert store.scores("sum", 0).dtype == np.float16


@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
@pytest.mark.parametrize("actors", [1, 4])
def test_pools_leave_cpus_for_decoding(cpus, actors):
    pools = [ModelConfig(f"m{n}", "x:y@z") for n in range(actors)]
    claimed = actors * actor_cpus(cpus, pools)
    assert 0 < claimed <= cpus - 0.5


def test_too_many_actors_are_refused_instead_of_hanging():
    with pytest.raises(ConfigError, match="400 actors do not fit 2 CPUs"):
        actor_cpus(2, [ModelConfig("m", "x:y@z", actors=400)])


def test_stores_filled_together_equal_those_filled_alone(tmp_path):
    model = ModelConfig("a", "clip4cir:sum@random-tiny", batch=8)
    roots = [image_folder(tmp_path / name, 12, 5) for name in ("one", "two")]
    configs = [
        PrecomputeConfig(DatasetConfig("folder", root=str(root)), (model,), str(tmp_path / f"s{n}"))
        for n, root in enumerate(roots)
    ]
    datasets = [load_dataset(config.dataset) for config in configs]
    together = precompute_together(configs, datasets)
    alone = precompute(replace(configs[1], store=str(tmp_path / "alone"))).store
    assert [outcome.blocks for outcome in together] == [3, 3]
    for key in [*alone.feature_keys("a", "gallery"), *alone.score_keys("a")]:
        assert np.array_equal(together[1].store.read(key), alone.read(key))
    assert sum(outcome.blocks for outcome in precompute_together(configs, datasets)) == 0
    other = replace(configs[1], models=(ModelConfig("b", "clip4cir:sum@random-tiny"),))
    with pytest.raises(ConfigError, match="need the same models"):
        precompute_together([configs[0], other], datasets)
