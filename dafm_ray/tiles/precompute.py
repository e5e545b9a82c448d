"""The precompute job: features, then similarity tiles; what is finished is never done again."""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from dafm_ray.config import ModelConfig, PrecomputeConfig, to_yaml
from dafm_ray.datasets.base import Dataset
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.models.base import RANDOM
from dafm_ray.models.checkpoints import weights_digest
from dafm_ray.models.registry import resolve
from dafm_ray.progress import StatusWriter, progress
from dafm_ray.session import available_gpus, ensure_ray, quiet_data
from dafm_ray.tiles.encode import encode
from dafm_ray.tiles.lease import writing
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.preflight import settle
from dafm_ray.tiles.similarity import score_tiles
from dafm_ray.tiles.storage import Storage, open_storage
from dafm_ray.tiles.store import ROLES, Failure, Role, TileStore
from dafm_ray.tiles.unpack import unpack

QUARANTINE = "quarantine.csv"


@dataclass(frozen=True)
class Outcome:
    """A finished precompute.

    Attributes:
        blocks: encode blocks and tiles computed by this run; 0 when all were there.
        failures: items of the store that could not be used.
    """

    store: TileStore
    blocks: int
    failures: list[Failure]


def precompute(config: PrecomputeConfig, dataset: Dataset | None = None) -> Outcome:
    """Fill a store with the features and tiles of every model.

    Args:
        config: the job.
        dataset: what is searched, if it is open already.

    Raises:
        ConfigError, DataError: see `TileStore.create` and `encode`.
        MachineError: another run holds the store, or the disk refuses.
    """
    dataset = dataset or load_dataset(config.dataset)
    grid = Grid(config.encode_block, config.tile_queries, config.tile_candidates)
    names = [model.name for model in config.models]
    models = {model.name: _entry(model) for model in config.models}
    storage = open_storage(config.store)
    with writing(storage):
        spec = asdict(config.dataset)
        store = TileStore.create(config.store, dataset, spec, models, grid, config.score_type)
        storage.write("config.yaml", pa.py_buffer(to_yaml(config).encode()))
        if store.missing(names) or store.failures():
            dataset = unpack(store, dataset, _status_writer(storage))
        _retry_quarantined(store, dataset)
        keys = [key for name in names for role in ROLES for key in store.feature_keys(name, role)]
        done = store.finished()
        features_done = sum(key in done for key in keys)
        tiles = [key for name in names for key in store.score_keys(name)]
        tiles_done = sum(key in done for key in tiles)
        missing = len(keys) - features_done + len(tiles) - tiles_done
        if missing:
            status = _status_writer(storage)
            ensure_ray()
            quiet_data()
            pools = [m for m in config.models if not _encoded(store, m.name, done)]
            with progress("preflight", len(pools), 0, "model", status) as shown:
                pools = settle(store, pools, available_gpus(), shown)
            with progress("encode", len(keys), features_done, "block", status) as shown:
                encode(store, dataset, pools, shown)
            with progress("similarity", len(tiles), tiles_done, "tile", status) as shown:
                score_tiles(store, names, shown, config.scoring_gpus)
        failures = store.failures()
        store.finished()
        if failures:
            storage.write(QUARANTINE, _table(failures))
        else:
            storage.delete(QUARANTINE)
    return Outcome(store, missing, failures)


def _entry(model: ModelConfig) -> ModelEntry:
    weights = resolve(model.id)[1].weights
    digest = weights if weights in RANDOM else weights_digest(weights)
    return ModelEntry(model.id, digest, model.batch, model.precision)


def _encoded(store: TileStore, model: str, done: Collection[str]) -> bool:
    return all(key in done for role in ROLES for key in store.feature_keys(model, role))


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


def _status_writer(storage: Storage) -> StatusWriter:
    return lambda data: storage.write("status.json", pa.py_buffer(data))


def _table(failures: Sequence[Failure]) -> pa.Buffer:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["role", "id", "reason"])
    writer.writerows((failure.role, failure.id, failure.reason) for failure in failures)
    return pa.py_buffer(text.getvalue().encode())
