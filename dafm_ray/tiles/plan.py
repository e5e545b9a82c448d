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
from dafm_ray.markdown import markdown_table
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
from dafm_ray.tiles.encode import CPUS_A_DECODER
from dafm_ray.tiles.forward import Forward, device_of
from dafm_ray.tiles.manifest import ModelEntry
from dafm_ray.tiles.precompute import entries
from dafm_ray.tiles.preflight import check_gpus, measure
from dafm_ray.tiles.shortlist import first_of
from dafm_ray.tiles.similarity import padded, score_block
from dafm_ray.tiles.store import ROLES, TileStore
from dafm_ray.tiles.unpack import bytes_to_unpack, unpacked
from dafm_ray.uris import shown

if TYPE_CHECKING:
    from PIL import Image

SAMPLE = 32
"""Images that are decoded."""

PROBE = 256, 4096
"""Queries and candidates of the tile that is scored, at most."""

COMPACT = 200
"""K of the shortlists that are compared with all scores."""

LARGE_BYTES = 50_000_000_000
"""All scores below this need no second thought."""


@dataclass(frozen=True)
class ModelPlan:
    """What one sub-model takes.

    Attributes:
        pool: as it would run: batch, precision and share of a GPU are settled.
        rate: images or queries an actor encodes in a second; 0 where it cannot be measured here.
        candidate_bytes: of a candidate's features.
        query_bytes: of a query's features.
        pair_s: seconds a pair of query and candidate takes to score, on one CPU or GPU.
        listed_s: the same with the search of the first candidates of a shortlist.
        features_left: share of its features that the store lacks.
        scores_left: share of its scores that the store lacks.
    """

    pool: ModelConfig
    rate: float
    candidate_bytes: int
    query_bytes: int
    pair_s: float
    listed_s: float
    features_left: float = 1.0
    scores_left: float = 1.0

    @property
    def is_there(self) -> bool:
        """Whether the store has all of it."""
        return not self.features_left and not self.scores_left


@dataclass(frozen=True)
class Plan:
    """What a precompute would take. Bytes and seconds are of what the store lacks.

    Attributes:
        config: the job, as an existing store goes on with it.
        images: candidates.
        queries: of the data set.
        references: distinct images of the queries, which are decoded once more.
        cpus: of the cluster.
        gpus: of the cluster.
        decode_s: seconds an image takes to decode on one CPU.
        models: of the job.
        free_bytes: where the store lies; None where nobody can know.
        unpacked_bytes: of images that are unpacked beside the tiles.
        blocks: of the job in a store that exists; 0 where there is none.
        blocks_there: of these, finished.
    """

    config: PrecomputeConfig
    images: int
    queries: int
    references: int
    cpus: float
    gpus: float
    decode_s: float
    models: tuple[ModelPlan, ...]
    free_bytes: int | None
    unpacked_bytes: int = 0
    blocks: int = 0
    blocks_there: int = 0

    @property
    def pairs(self) -> int:
        """Queries times candidates, of one model."""
        return self.images * self.queries

    @property
    def feature_bytes(self) -> int:
        """Of the features of all models."""
        return sum(map(self._features_of, self.models))

    def _features_of(self, model: ModelPlan) -> int:
        whole = self.images * model.candidate_bytes + self.queries * model.query_bytes
        return round(whole * model.features_left)

    @property
    def tile_bytes(self) -> int:
        """Of the scores of every query and candidate under all models."""
        each = self.pairs * np.dtype(self.config.score_type).itemsize
        return round(each * sum(model.scores_left for model in self.models))

    def shortlist_bytes(self, k: int) -> int:
        """At most, of shortlists: models agree on many candidates."""
        width = min(self.images, k * len(self.models)) + 1
        scores = len(self.models) * np.dtype(self.config.score_type).itemsize
        return self.queries * width * (scores + 8)

    @property
    def score_bytes(self) -> int:
        """Of the scores that are kept."""
        k = self.config.shortlist
        if not k:
            return self.tile_bytes
        return round(self.shortlist_bytes(k) * max(model.scores_left for model in self.models))

    @property
    def store_bytes(self) -> int:
        """Of all that is written."""
        return self.feature_bytes + self.score_bytes + self.unpacked_bytes

    @property
    def stages(self) -> dict[str, float]:
        """What works at the same time while features are made -> seconds; the longest is what the
        job waits for.
        """
        decoders = max(1, int(self.cpus / CPUS_A_DECODER))
        # A block is decoded once for all models that lack it.
        share = max(model.features_left for model in self.models)
        on_cpus = (self.images + self.references) * share * self.decode_s
        found = {"decoding": on_cpus / decoders}
        for model in self.models:
            items = (self.images + self.queries) * model.features_left
            if model.rate:
                found[f"encoding with {model.pool.name}"] = items / model.rate / model.pool.actors
                on_cpus += 0 if model.pool.num_gpus else items / model.rate
        found["the CPUs together"] = on_cpus / max(self.cpus, 1)
        return found

    @property
    def encode_s(self) -> float:
        """Seconds until all features are made."""
        return max(self.stages.values())

    @property
    def score_s(self) -> float:
        """Seconds until all scores are made."""
        each = [
            (model.listed_s if self.config.shortlist else model.pair_s) * model.scores_left
            for model in self.models
        ]
        gpus = self.config.scoring_gpus
        at_once = min(self.cpus, self.gpus / gpus) if gpus else self.cpus
        return self.pairs * sum(each) / max(at_once, 1)

    @property
    def limit(self) -> str:
        """What the job waits for most, in words."""
        stages = {**self.stages, "scoring": self.score_s}
        longest = max(stages, key=lambda stage: stages[stage])
        return f"{longest} ({duration(stages[longest])})"

    @property
    def advice(self) -> list[str]:
        """What to change before the job is started."""
        found = []
        free = self.free_bytes
        if free is not None and self.store_bytes > free:
            found.append(
                f"It does not fit: {amount(self.store_bytes)} are needed and {amount(free)} are "
                f"free at {shown(self.config.store)}."
            )
        all_scores = self.tile_bytes > max(LARGE_BYTES, 2 * self.feature_bytes)
        if not self.config.shortlist and (all_scores or self._shortlists_fit):
            small, features = self.shortlist_bytes(COMPACT), self.feature_bytes
            times = f", {self.tile_bytes / features:,.0f} times the features" if features else ""
            elsewhere = " and another store" if self.blocks else ""
            found.append(
                f"Scores of every query and candidate make no sense here ({amount(self.tile_bytes)}"
                f"{times}). Set shortlist: {COMPACT}{elsewhere}, which keeps at most "
                f"{amount(small)} (docs/scale.md)."
            )
        unmeasured = [m.pool.name for m in self.models if not m.rate and not m.is_there]
        if unmeasured:
            found.append(
                f"{', '.join(unmeasured)} cannot be measured before the job (another process "
                "encodes); their time and features are not in the sums."
            )
        return found

    @property
    def _shortlists_fit(self) -> bool:
        """Whether all scores are too much for the disk, and shortlists would be much less."""
        free, small = self.free_bytes, self.shortlist_bytes(COMPACT)
        if free is None or self.store_bytes <= free or 2 * small >= self.tile_bytes:
            return False
        return self.store_bytes - self.tile_bytes + small <= free

    def lines(self) -> list[str]:
        """For people."""
        header = ("model", "actors", "on", "batch", "precision", "items/s", "features")
        rows = [
            (
                model.pool.name,
                str(model.pool.actors),
                f"{float(model.pool.num_gpus):g} GPU" if model.pool.num_gpus else "CPU",
                str(model.pool.batch),
                model.pool.precision,
                f"{model.rate * model.pool.actors:,.1f}" if model.rate else "-",
                amount(self._features_of(model)),
            )
            for model in self.models
        ]
        k = self.config.shortlist
        kind = (
            f"shortlists of the first {k} of each model, at most {amount(self.score_bytes)}"
            if k
            else f"scores of every query and candidate, {amount(self.score_bytes)}"
        )
        images = f"images    unpacked, {amount(self.unpacked_bytes)}, once; its time is in no sum"
        free = "" if self.free_bytes is None else f" ({amount(self.free_bytes)} free)"
        there = f"; {self.blocks_there:,} of {self.blocks:,} blocks are there"
        more = " more" if self.blocks else ""
        return [
            f"{self.images:,} images, {self.queries:,} queries with {self.references:,} reference "
            f"images, {len(self.models)} models; {self.cpus:g} CPUs, {self.gpus:g} GPUs",
            "",
            markdown_table(header, rows, words=1),
            "",
            f"features  {amount(self.feature_bytes)}, in about {duration(self.encode_s)} "
            f"(an image is decoded in {1000 * self.decode_s:.1f} ms)",
            f"scores    {kind}, in about {duration(self.score_s)}",
            *([images] if self.unpacked_bytes else []),
            f"store     {amount(self.store_bytes)}{more} at {shown(self.config.store)}{free}"
            f"{there if self.blocks else ''}",
            "in all    nothing is left to do"
            if all(model.is_there for model in self.models)
            else f"in all    about {duration(self.encode_s + self.score_s)}, and up to a minute "
            f"for Ray and the models to start; most of it waits for {self.limit}",
            *self.advice,
        ]


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


def amount(size: float) -> str:
    """Bytes, in words."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds, in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
