"""Encoding on Ray Data: a decode stage on CPUs, then one actor pool a sub-model.

A row of the pipeline is one encode block (`Unit`). Its images are decoded once, whatever the
number of sub-models, and pass from pool to pool; each pool preprocesses, encodes and commits its
own block. A block's shape does not depend on the number of actors, so neither do its features.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from dafm_ray.config import ModelConfig
from dafm_ray.datasets.base import Dataset, ImageSource
from dafm_ray.datasets.images import ImageError
from dafm_ray.errors import ConfigError
from dafm_ray.models.registry import load_model
from dafm_ray.progress import Progress
from dafm_ray.session import Row, available_cpus, explained, finished, one_thread
from dafm_ray.tiles.store import ROLES, Failure, Role, TileStore, feature_key, spans

if TYPE_CHECKING:
    from PIL import Image

    from dafm_ray.tiles.forward import Forward

DECODE_CPUS = 0.5


@dataclass(frozen=True)
class Unit:
    """One encode block on its way through the pipeline.

    Attributes:
        images: the distinct images of the block, decoded, or the reason why one is unusable.
            Candidates have one each; queries share their references.
        image_index: which image each item uses.
        captions: of each query; empty for candidates.
        todo: models whose block is not finished.
    """

    role: Role
    block: int
    ids: tuple[str, ...]
    locators: tuple[str, ...]
    image_index: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]
    todo: tuple[str, ...]
    images: tuple["Image.Image | str", ...] = field(default=(), repr=False)


def plan_units(store: TileStore, dataset: Dataset, models: Sequence[str]) -> list[Unit]:
    """Blocks that at least one of `models` has not finished."""
    done = store.finished()
    units: list[Unit] = []
    for role in ROLES:
        for block, rows in enumerate(spans(store.size(role), store.manifest.grid.encode_block)):
            todo = tuple(m for m in models if feature_key(m, role, block) not in done)
            if todo:
                units.append(_unit(dataset, role, block, rows, todo))
    return units


def _unit(dataset: Dataset, role: Role, block: int, rows: range, todo: tuple[str, ...]) -> Unit:
    gallery = dataset.gallery
    if role == "gallery":
        ids = gallery.ids[rows.start : rows.stop]
        locators = gallery.locators[rows.start : rows.stop]
        return Unit(role, block, ids, locators, tuple(range(len(rows))), (), todo)
    queries = dataset.queries[rows.start : rows.stop]
    references = list(dict.fromkeys(query.reference for query in queries))
    index = {id: n for n, id in enumerate(references)}
    return Unit(
        role,
        block,
        tuple(query.id for query in queries),
        tuple(gallery.locators[gallery.position(id)] for id in references),
        tuple(index[query.reference] for query in queries),
        tuple(query.captions for query in queries),
        todo,
    )


def encode(
    store: TileStore, dataset: Dataset, pools: Sequence[ModelConfig], shown: Progress
) -> None:
    """Encode every unfinished block; needs a Ray session.

    Args:
        store: receives the features and the quarantine.
        dataset: opens the images.
        pools: one a model, settled.
        shown: counts blocks, once per model.

    Raises:
        ConfigError: the pools do not fit the cluster.
    """
    import ray.data

    units = plan_units(store, dataset, [pool.name for pool in pools])
    if not units:
        return
    busy = {model for unit in units for model in unit.todo}
    pools = [pool for pool in pools if pool.name in busy]
    rows = [{"unit": pickle.dumps(unit)} for unit in units]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        decode, fn_kwargs={"source": dataset.source, "store": store}, num_cpus=DECODE_CPUS
    )
    cpus = actor_cpus(available_cpus(), pools)
    for pool in pools:
        stream = stream.map(
            Encoder,
            fn_constructor_kwargs={"store": store, "pool": pool, "last": pool is pools[-1]},
            compute=ray.data.ActorPoolStrategy(size=pool.actors),
            num_cpus=cpus,
            num_gpus=float(pool.num_gpus) or None,
        )
    for row in map(finished, stream.iter_rows()):
        shown.advance(row["blocks"], row["failures"])


def actor_cpus(cpus: float, pools: Sequence[ModelConfig]) -> float:
    """CPUs an actor may claim so that decoding always finds some; a starved pool hangs silently.

    Raises:
        ConfigError: too many actors.
    """
    actors = sum(pool.actors for pool in pools)
    budget = cpus - max(1.0, cpus / 4) if cpus >= 2 else cpus - DECODE_CPUS
    # Hundredths, and never equal to the decode stage's, which Ray Data would then fuse with it.
    share = min(1.0, int(100 * budget / actors) / 100)
    if share <= 0:
        raise ConfigError(
            f"{actors} actors do not fit {cpus:g} CPUs; lower `actors` of the models, "
            "or start Ray with more CPUs"
        )
    return share - 0.01 if share == DECODE_CPUS else share


def decode(row: Row, source: ImageSource, store: TileStore) -> Row:
    """Decode a unit's images and list those that cannot be used."""
    return explained(lambda: _decode(pickle.loads(row["unit"]), source, store), row)


def _decode(unit: Unit, source: ImageSource, store: TileStore) -> Row:
    images = tuple(_open(source, locator) for locator in unit.locators)
    failures = [
        Failure(unit.role, id, reason)
        for id, index in zip(unit.ids, unit.image_index, strict=True)
        if isinstance(reason := images[index], str)
    ]
    if failures:
        store.quarantine(unit.role, unit.block, failures)
    return {"unit": pickle.dumps(replace(unit, images=images), pickle.HIGHEST_PROTOCOL)}


def _open(source: ImageSource, locator: str) -> "Image.Image | str":
    try:
        return source.open(locator)
    except ImageError as error:
        return str(error)


class Encoder:
    """An actor of one model's pool. It loads its model at the first unit, so that weights which do
    not fit are explained: an actor that dies while it starts takes its reason along.
    """

    def __init__(self, store: TileStore, pool: ModelConfig, last: bool) -> None:
        one_thread()
        self.store = store
        self.pool = pool
        self.last = last

    @cached_property
    def forward(self) -> "Forward":
        """The pool's model on its device, as the manifest says it encodes."""
        from dafm_ray.tiles.forward import Forward, device_of

        entry = self.store.manifest.models[self.pool.name]
        device = device_of(float(self.pool.num_gpus))
        return Forward(load_model(self.pool.id), device, entry.precision, entry.batch)

    def __call__(self, row: Row) -> Row:
        """Commit the block if this model has not; pass the unit on, or a count at the end."""
        return explained(lambda: self._encode(row), row)

    def _encode(self, row: Row) -> Row:
        unit: Unit = pickle.loads(row["unit"])
        if self.pool.name in unit.todo:
            features = self.forward(unit.images, unit.image_index, unit.captions)
            self.store.write(feature_key(self.pool.name, unit.role, unit.block), features)
        if not self.last:
            return {"unit": row["unit"]}
        failed = sum(isinstance(unit.images[index], str) for index in unit.image_index)
        return {"blocks": len(unit.todo), "failures": failed}
