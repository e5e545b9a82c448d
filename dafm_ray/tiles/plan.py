"""What a precompute would take, before anything is written: measured on a sample, multiplied out.

Every number that is measured is measured on the cluster the job would run on: decoding on a sample
of the data set's own images, each model with the batch it would run with, scoring on a small tile
of its own features. What is worked out from them is an expectation, not a promise. What a store
holds already is not counted again.
"""

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dafm_ray.config import ModelConfig, PrecomputeConfig
from dafm_ray.datasets.base import Dataset, ImageSource
from dafm_ray.datasets.images import decode
from dafm_ray.datasets.shards import ParquetImages
from dafm_ray.datasets.sources import opened
from dafm_ray.models.registry import load_model, resolve
from dafm_ray.session import (
    Row,
    available_cpus,
    available_gpus,
    cpu_resources,
    ensure_ray,
    explained,
    finished,
    one_thread,
)
from dafm_ray.storage import LocalStorage, open_storage
from dafm_ray.tiles.estimate import ModelPlan, Plan
from dafm_ray.tiles.forward import Forward, device_of
from dafm_ray.tiles.manifest import ModelEntry
from dafm_ray.tiles.precompute import entries
from dafm_ray.tiles.preflight import check_gpus, measure
from dafm_ray.tiles.shortlist import first_of
from dafm_ray.tiles.similarity import padded, score_block
from dafm_ray.tiles.store import ROLES, TileStore
from dafm_ray.tiles.unpack import bytes_to_unpack, unpacked

if TYPE_CHECKING:
    from PIL import Image

SAMPLE = 32
"""Images that are decoded."""

PROBE = 256, 4096
"""Queries and candidates of the tile that is scored, at most."""


def plan(config: PrecomputeConfig, dataset: Dataset) -> Plan:
    """Measure, and work out what the job would take; writes nothing.

    Args:
        config: the job.
        dataset: what is searched.

    Raises:
        ConfigError: the pools do not fit the cluster, or see `TileStore.create`.
        DataError: see `load_model` and `TileStore.create`.
        MachineError: a model does not fit a GPU, or the store cannot be reached.
    """
    models = entries(config.models)
    store = TileStore.find(config.store, dataset, models, config.shortlist)
    keys: dict[str, tuple[list[str], list[str]]] = {}
    done: set[str] = set()
    unpacking = 0
    if store is None:
        # A bucket that is not there looks like an empty one to all but a listing.
        open_storage(config.store).has_folder("")
        unpacking = bytes_to_unpack(None, dataset)
    else:
        config = _as_stored(config, store, models)
        keys = {name: _keys(store, name) for name in models}
        done = store.finished()
        if any(_left(scores, done) for _, scores in keys.values()) or store.failures():
            unpacking = bytes_to_unpack(store, dataset)
        dataset = unpacked(store, dataset)
    ensure_ray()
    gpus = available_gpus()
    references = len({query.reference for query in dataset.queries})
    measured = [
        _measured(config, pool, gpus, *(_left(part, done) for part in keys.get(pool.name, ())))
        for pool in config.models
    ]
    check_gpus([model.pool for model in measured if model.features_left], gpus)
    every = [key for parts in keys.values() for part in parts for key in part]
    return Plan(
        config,
        len(dataset.gallery),
        len(dataset.queries),
        references,
        available_cpus(),
        gpus,
        _decode_s(dataset),
        tuple(measured),
        _free(config.store),
        unpacking,
        len(every),
        sum(key in done for key in every),
    )


def _as_stored(
    config: PrecomputeConfig, store: TileStore, models: dict[str, ModelEntry]
) -> PrecomputeConfig:
    """The job with what a store keeps of its first run, whatever is asked for."""
    started, grid = store.started(models), store.manifest.grid
    return replace(
        config,
        models=tuple(
            replace(pool, batch=started[pool.name].batch, precision=started[pool.name].precision)
            if pool.name in started
            else pool
            for pool in config.models
        ),
        encode_block=grid.encode_block,
        tile_queries=grid.tile_queries,
        tile_candidates=grid.tile_candidates,
        score_type=store.manifest.score_type,
    )


def _keys(store: TileStore, model: str) -> tuple[list[str], list[str]]:
    """Blocks of features and of scores."""
    features = [key for role in ROLES for key in store.feature_keys(model, role)]
    return features, store.score_keys(model)


def _left(keys: Sequence[str], done: Collection[str]) -> float:
    return sum(key not in done for key in keys) / max(len(keys), 1)


def _measured(
    config: PrecomputeConfig,
    pool: ModelConfig,
    gpus: float,
    features_left: float = 1.0,
    scores_left: float = 1.0,
) -> ModelPlan:
    if features_left or scores_left:
        found = _measured_whole(config, pool, gpus)
    else:  # it is not loaded either, and needs no GPU
        share = 0.0 if pool.num_gpus == "auto" else pool.num_gpus
        found = ModelPlan(replace(pool, num_gpus=share), 0.0, 0, 0, 0.0, 0.0)
    return replace(found, features_left=features_left, scores_left=scores_left)


def _measured_whole(config: PrecomputeConfig, pool: ModelConfig, gpus: float) -> ModelPlan:
    import ray

    if not resolve(pool.id)[0].runs_here:
        settled = replace(pool, precision="fp32", num_gpus=resolve(pool.id)[0].gpus_elsewhere())
        return ModelPlan(settled, 0.0, 0, 0, 0.0, 0.0)
    share = (1.0 if gpus else 0.0) if pool.num_gpus == "auto" else pool.num_gpus
    check_gpus([replace(pool, num_gpus=share, actors=1)], gpus)
    resources = {} if share else cpu_resources()
    remote = ray.remote(num_cpus=1, num_gpus=share, resources=resources)(_measure_row)
    row = {"pool": pool, "config": config, "gpus": share}
    found: ModelPlan = finished(ray.get(remote.remote(row)))["plan"]
    if pool.num_gpus == "auto":
        return found
    return replace(found, pool=replace(found.pool, num_gpus=share))


def _measure_row(row: Row) -> Row:
    def measured() -> Row:
        one_thread()
        return {"plan": _measure(row["pool"], row["config"], device_of(row["gpus"]))}

    return explained(measured, row)


def _measure(pool: ModelConfig, config: PrecomputeConfig, device: str) -> ModelPlan:
    from PIL import Image

    model = load_model(pool.id)
    settled = measure(model, pool, config.encode_block, device)
    forward = Forward(model, device, settled.precision, settled.batch)
    picture = Image.new("RGB", (400, 300), "gray")
    candidate = forward([picture], [0])
    query = forward([picture], [0], [("the same in red",)])
    queries, candidates = min(PROBE[0], config.tile_queries), min(PROBE[1], config.tile_candidates)
    # Features of one picture score as fast as those of many.
    noise = np.random.default_rng(0).standard_normal((candidates, *candidate.shape[1:]))
    many = padded((noise / 10).astype(np.float32))
    asked = np.repeat(query, queries, axis=0)
    scoring = device if config.scoring_gpus else "cpu"
    many = many.to(scoring)
    score_block(pool.id, asked, many, scoring)
    started = time.perf_counter()
    scores = score_block(pool.id, asked, many, scoring)[:queries, :candidates]
    scored_s = time.perf_counter() - started
    first_of(scores[None], 0, max(1, config.shortlist))
    listed_s = time.perf_counter() - started
    pairs = queries * candidates
    pool = replace(
        pool, batch=settled.batch, precision=settled.precision, num_gpus=settled.num_gpus
    )
    return ModelPlan(
        pool, settled.rate, candidate.nbytes, query.nbytes, scored_s / pairs, listed_s / pairs
    )


def _decode_s(dataset: Dataset) -> float:
    import ray

    step = max(1, len(dataset.gallery) // SAMPLE)
    locators = dataset.gallery.locators[::step][:SAMPLE]
    seconds: float = ray.get(
        ray.remote(num_cpus=1, resources=cpu_resources())(_decoded).remote(dataset.source, locators)
    )
    return seconds


@dataclass(frozen=True)
class _AtHand:
    """Bytes of images, by locator."""

    data: dict[str, bytes]

    def open(self, locator: str) -> "Image.Image":
        return decode(self.data.get(locator, b""))


def _decoded(source: ImageSource, locators: Sequence[str]) -> float:
    if isinstance(source, ParquetImages):
        # The job opens tars instead, where no row group is searched for each image.
        source = _AtHand({locator: source.read(locator) for locator in locators if locator})
    started = time.perf_counter()
    for _ in opened(source, locators):
        pass
    return (time.perf_counter() - started) / len(locators)


def _free(uri: str) -> int | None:
    storage = open_storage(uri)
    if not isinstance(storage, LocalStorage):
        return None
    there = next(path for path in (storage.root, *storage.root.parents) if path.is_dir())
    return shutil.disk_usage(Path(there)).free
