"""The precompute job: features, then similarity tiles; what is finished is never done again."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import pyarrow as pa

from dafm_ray.config import ModelConfig, PrecomputeConfig, to_yaml
from dafm_ray.datasets.base import Dataset
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError
from dafm_ray.files import csv_text
from dafm_ray.lease import writing
from dafm_ray.models.checkpoints import weights_digest
from dafm_ray.models.registry import resolve
from dafm_ray.progress import progress, status_writer
from dafm_ray.session import available_gpus, ensure_ray, quiet_data, watched
from dafm_ray.storage import open_storage
from dafm_ray.tiles.encode import Part, encode
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.preflight import settle
from dafm_ray.tiles.shortlist import list_candidates
from dafm_ray.tiles.similarity import score_tiles
from dafm_ray.tiles.store import ROLES, Failure, Role, TileStore
from dafm_ray.tiles.unpack import unpack

QUARANTINE = "quarantine.csv"


@dataclass(frozen=True)
class Outcome:
    """A finished precompute.

    Attributes:
        blocks: encode blocks and tiles computed by this run; 0 when all were there.
        failures: items of the store that could not be used.
        cut: model -> how many texts are longer than it reads.
    """

    store: TileStore
    blocks: int
    failures: list[Failure]
    cut: dict[str, int]


def precompute(config: PrecomputeConfig, dataset: Dataset | None = None) -> Outcome:
    """Fill a store with the features and tiles of every model.

    Args:
        config: the job.
        dataset: what is searched, if it is open already.

    Raises:
        ConfigError, DataError: see `TileStore.create` and `encode`.
        MachineError: another run holds the store, or the disk refuses.
    """
    return precompute_together([config], [dataset or load_dataset(config.dataset)])[0]


def precompute_together(
    configs: Sequence[PrecomputeConfig], datasets: Sequence[Dataset]
) -> list[Outcome]:
    """Fill several stores under the same models, whose pools start once; see `precompute`.

    Raises:
        ConfigError: the configurations name other models.
    """
    pools = configs[0].models
    if any(config.models != pools for config in configs):
        raise ConfigError("stores that are filled together need the same models")
    names = [model.name for model in pools]
    with ExitStack() as held:
        opened = [
            _opened(config, dataset, held)
            for config, dataset in zip(configs, datasets, strict=True)
        ]
        stores = [store for store, _ in opened]
        features = [_finished(store, _feature_keys(store, names)) for store in stores]
        tiles = [_finished(store, _score_keys(store, names)) for store in stores]
        missing = [f.count(False) + t.count(False) for f, t in zip(features, tiles, strict=True)]
        if any(missing):
            status = status_writer(*(store.storage for store in stores))
            ensure_ray()
            quiet_data()
            waiting = [pool for pool in pools if not all(_encoded(s, pool.name) for s in stores)]
            with progress("preflight", len(waiting) * len(stores), 0, "model", status) as shown:
                for store in stores:
                    waiting = settle(store, waiting, available_gpus(), shown)
            encoded = [done for part in features for done in part]
            encoding = progress("encode", len(encoded), sum(encoded), "block", status)
            with encoding as shown, watched(shown):
                encode(opened, waiting, shown)
            scored = [done for part in tiles for done in part]
            scoring = progress("similarity", len(scored), sum(scored), "tile", status)
            with scoring as shown, watched(shown):
                for store, part in zip(stores, configs, strict=True):
                    score = list_candidates if part.shortlist else score_tiles
                    score(store, names, shown, part.scoring_gpus)
        return [
            Outcome(store, blocks, _list_failures(store), _counted(store.cut_texts()))
            for store, blocks in zip(stores, missing, strict=True)
        ]


def _opened(config: PrecomputeConfig, dataset: Dataset, held: ExitStack) -> Part:
    """The store under its lease, and the data set as it can be read in any order."""
    grid = Grid(config.encode_block, config.tile_queries, config.tile_candidates)
    models = entries(config.models)
    storage = open_storage(config.store)
    held.enter_context(writing(storage))
    spec = asdict(config.dataset)
    store = TileStore.create(
        config.store, dataset, spec, models, grid, config.score_type, config.shortlist
    )
    storage.write("config.yaml", pa.py_buffer(to_yaml(config).encode()))
    if store.missing(models) or store.failures():
        dataset = unpack(store, dataset, status_writer(storage))
    _retry_quarantined(store, dataset)
    return store, dataset


def _feature_keys(store: TileStore, models: Sequence[str]) -> list[str]:
    return [key for name in models for role in ROLES for key in store.feature_keys(name, role)]


def _score_keys(store: TileStore, models: Sequence[str]) -> list[str]:
    return [key for name in models for key in store.score_keys(name)]


def _finished(store: TileStore, keys: Sequence[str]) -> list[bool]:
    done = store.finished()
    return [key in done for key in keys]


def entries(models: Sequence[ModelConfig]) -> dict[str, ModelEntry]:
    """What a new store would hold of each model.

    Raises:
        DataError: see `weights_digest`.
    """
    digests = [weights_digest(resolve(model.id)[1].weights) for model in models]
    return {
        model.name: ModelEntry(model.id, digest, model.batch, model.precision)
        for model, digest in zip(models, digests, strict=True)
    }


def _encoded(store: TileStore, model: str) -> bool:
    return all(_finished(store, _feature_keys(store, [model])))


def _list_failures(store: TileStore) -> list[Failure]:
    """What could not be used; also written as a table for people."""
    failures = store.failures()
    store.finished()
    if failures:
        rows = ((failure.role, failure.id, failure.reason) for failure in failures)
        table = csv_text(("role", "id", "reason"), rows)
        store.storage.write(QUARANTINE, pa.py_buffer(table.encode()))
    else:
        store.storage.delete(QUARANTINE)
    return failures


def _counted(cut: dict[str, list[str]]) -> dict[str, int]:
    return {model: len(queries) for model, queries in cut.items()}


def _retry_quarantined(store: TileStore, dataset: Dataset) -> None:
    """Forget the blocks of quarantined items that can be used by now."""
    step = store.manifest.grid.encode_block
    gallery = dataset.gallery
    reference = {query.id: query.reference for query in dataset.queries}
    place = {query.id: n for n, query in enumerate(dataset.queries)}
    mended: set[tuple[Role, int]] = set()
    for failure in store.failures():
        queries = failure.role == "queries"
        image = reference[failure.id] if queries else failure.id
        position = place[failure.id] if queries else gallery.position(failure.id)
        try:
            dataset.source.open(gallery.locators[gallery.position(image)])
        except ImageError:
            continue
        mended.add((failure.role, position // step))
    for role, block in mended:
        store.forget(role, block)
