import shutil
from dataclasses import replace
from pathlib import Path

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
from dafm_ray.tiles.store import ROLES, TileStore
from tests.samples import image_folder, open_folder

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(150)]

MODELS = (
    ModelConfig("sum", "clip4cir:sum@random-tiny"),
    ModelConfig("text", "zeroshot:text@random-tiny"),
)


def config_of(folder):
    root = image_folder(folder / "images", images=22, queries=13)
    queries = root / "queries.jsonl"
    queries.write_text(queries.read_text().replace("change 5", "change 5 " * 40))
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


@pytest.fixture(scope="module")
def together(tmp_path_factory, first):
    """The same images with other tiles, and in another order, filled together by two actors a
    model; no test changes them.
    """
    folder = tmp_path_factory.mktemp("together")
    models = tuple(replace(model, actors=2) for model in MODELS)
    config = replace(first[0], models=models, tile_queries=13, tile_candidates=22)
    configs = [replace(config, store=str(folder / name)) for name in ("other", "third")]
    dataset = open_folder(config.dataset.root)
    datasets = [dataset, reordered(dataset)]
    return configs, datasets, precompute_together(configs, datasets)


@pytest.fixture(scope="module")
def broken(tmp_path_factory, local_ray):
    """A finished run with two unusable images, which no test changes."""
    config = config_of(tmp_path_factory.mktemp("broken"))
    (Path(config.dataset.root) / "000.png").write_bytes(b"")
    (Path(config.dataset.root) / "015.png").write_bytes(b"<html>404</html>")
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


def test_bits_do_not_depend_on_actors_or_tiles_and_hits_not_on_the_source(first, together):
    one = first[1].store
    two, third = (outcome.store for outcome in together[2])
    for name in one.models:
        assert np.array_equal(whole(one, name), whole(two, name))
    own, shuffled = together[1]
    assert shuffled.gallery.source_order != own.gallery.source_order
    assert hits(one) == hits(two) == hits(third)


def test_stores_filled_together_equal_those_filled_alone(first, together):
    configs, datasets, outcomes = together
    alone, filled = first[1].store, outcomes[0].store
    assert [outcome.blocks for outcome in outcomes] == [2 * (3 + 2) + 2] * 2
    for name in alone.models:
        for role in ROLES:
            for key in alone.feature_keys(name, role):
                assert np.array_equal(filled.read(key), alone.read(key))
    assert sum(outcome.blocks for outcome in precompute_together(configs, datasets)) == 0
    other = replace(configs[1], models=(ModelConfig("b", "clip4cir:sum@random-tiny"),))
    with pytest.raises(ConfigError, match="need the same models"):
        precompute_together([configs[0], other], datasets)


def reordered(dataset: Dataset) -> Dataset:
    ids = np.random.default_rng(3).permutation(dataset.gallery.ids).tolist()
    queries = tuple(reversed(dataset.queries))
    return replace(dataset, gallery=Gallery.from_source({id: id for id in ids}), queries=queries)


def test_unusable_images_are_listed_and_the_rest_goes_on(broken):
    config, outcome = broken
    listed = {(failure.role, failure.id): failure.reason for failure in outcome.failures}
    assert listed[("gallery", "000.png")] == "the file is empty"
    assert "not an image" in listed[("gallery", "015.png")]
    assert {id for role, id in listed if role == "queries"} == {"q0", "q1"}
    table = Path(config.store, "quarantine.csv").read_text().splitlines()
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


def test_a_repaired_image_is_used_by_the_next_run(first, broken, config):
    whole_store, root = first[1].store, Path(config.dataset.root)
    shutil.copytree(broken[0].store, config.store)
    for name in ("000.png", "015.png"):
        shutil.copy(Path(broken[0].dataset.root) / name, root / name)
    again = precompute(config)
    assert (again.blocks, len(again.failures)) == (0, 4)
    for name in ("000.png", "015.png"):
        shutil.copy(Path(first[0].dataset.root) / name, root / name)
    mended = precompute(config)
    assert mended.failures == []
    assert not Path(config.store, "quarantine.csv").exists()
    for name in mended.store.models:
        assert np.array_equal(whole(mended.store, name), whole(whole_store, name))


def test_another_gallery_or_other_weights_are_refused(copied, tmp_path):
    config = copied
    with pytest.raises(DataError, match="other weights"):
        precompute(replace(config, models=(ModelConfig("sum", "clip4cir:sum@random"),)))
    (tmp_path / "images" / "000.png").unlink()
    (tmp_path / "images" / "gallery.txt").write_text("".join(f"{n:03d}.png\n" for n in range(21)))
    with pytest.raises(DataError, match="another gallery"):
        precompute(config)


def test_a_block_of_unusable_images_alone_is_quarantined_and_float16_tiles(config, tmp_path):
    """Two of one model, as its pool starts once."""
    (tmp_path / "images" / "000.png").write_bytes(b"")
    alone = replace(config, models=MODELS[:1], encode_block=1)
    half = replace(config, models=MODELS[:1], score_type="float16", store=str(tmp_path / "half"))
    dataset = load_dataset(config.dataset)
    blocks, small = precompute_together([alone, half], [dataset, dataset])
    assert len(blocks.failures) == 3
    assert blocks.store.missing() == []
    assert small.store.scores("sum", 0).dtype == np.float16


@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
@pytest.mark.parametrize("actors", [1, 4])
def test_pools_leave_cpus_for_decoding(cpus, actors):
    pools = [ModelConfig(f"m{n}", "x:y@z") for n in range(actors)]
    claimed = actors * actor_cpus(cpus, pools)
    assert 0 < claimed <= cpus - 0.5


def test_too_many_actors_are_refused_instead_of_hanging():
    with pytest.raises(ConfigError, match="400 actors do not fit 2 CPUs"):
        actor_cpus(2, [ModelConfig("m", "x:y@z", actors=400)])


def test_encoders_of_gpus_leave_the_cpus_to_the_others():
    gpu, cpu = ModelConfig("g", "x:y@z", actors=400, num_gpus=0.5), ModelConfig("c", "x:y@z")
    assert actor_cpus(2, [gpu, cpu]) == actor_cpus(2, [cpu])
    assert actor_cpus(2, [gpu]) == 0


def test_texts_that_a_model_reads_cut_are_listed(first):
    assert first[1].cut == {"sum": 1, "text": 1}
    assert first[1].store.cut_texts() == {"sum": ["q5"], "text": ["q5"]}
