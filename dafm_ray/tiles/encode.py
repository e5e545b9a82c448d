"""Encoding on Ray Data: a pool that decodes on CPUs, then one actor pool a sub-model.

A row of the pipeline is one encode block (`Unit`). Its images are decoded once, whatever the
number of sub-models, and pass from pool to pool; each pool preprocesses, encodes and commits its
own block. A block's shape does not depend on the number of actors, so neither do its features.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from dafm_ray.config import ModelConfig
from dafm_ray.datasets.base import Dataset, ImageSource
from dafm_ray.datasets.sources import opened
from dafm_ray.errors import ConfigError
from dafm_ray.progress import Progress
from dafm_ray.session import available_cpus, cpu_resources, one_thread
from dafm_ray.tiles.store import ROLES, Failure, Role, TileStore, feature_key, spans
from dafm_ray.tiles.transit import arrived, pack, staged

if TYPE_CHECKING:
    from PIL import Image

    from dafm_ray.config import Precision
    from dafm_ray.models.base import FrozenModel
    from dafm_ray.tiles.forward import Forward

DECODE_CPUS = 0.5
CPUS_A_DECODER = 4

UNIT_BYTES = 128_000_000
"""Pixels of one unit that travel; images beyond them are decoded once more where they are encoded,
so that a block of large photographs neither fills the object store nor a worker's memory."""

IN_FLIGHT = 4
"""Units at hand for an encoder. Ray Data submits every 0.1 s: with its default of 2 one waits."""


class Usable(NamedTuple):
    """An image that was found to be usable, and is decoded again where it is encoded."""

    locator: str


@dataclass(frozen=True)
class Unit:
    """One encode block on its way through the pipeline.

    Attributes:
        part: which of the stores it belongs to.
        images: the distinct images of the block, decoded, or why one is unusable, or where one too
            many to travel lies. Candidates have one each; queries share their references.
        image_index: which image each item uses.
        captions: of each query; empty for candidates.
        todo: models whose block is not finished.
    """

    part: int
    role: Role
    block: int
    ids: tuple[str, ...]
    locators: tuple[str, ...]
    image_index: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]
    todo: tuple[str, ...]
    images: tuple["Image.Image | str | Usable", ...] = field(default=(), repr=False)


class Encoded(NamedTuple):
    """What is left of a unit at the end: finished blocks of models, and unusable items."""

    blocks: int
    failures: int


Part = tuple[TileStore, Dataset]
"""A store and what opens the images it is made of."""


def plan_units(part: int, store: TileStore, dataset: Dataset, models: Sequence[str]) -> list[Unit]:
    """Blocks of a store that at least one of `models` has not finished."""
    done = store.finished()
    units: list[Unit] = []
    for role in ROLES:
        for block, rows in enumerate(spans(store.size(role), store.manifest.grid.encode_block)):
            todo = tuple(m for m in models if feature_key(m, role, block) not in done)
            if todo:
                units.append(_unit(part, dataset, role, block, rows, todo))
    return units


def _unit(
    part: int, dataset: Dataset, role: Role, block: int, rows: range, todo: tuple[str, ...]
) -> Unit:
    gallery = dataset.gallery
    if role == "gallery":
        ids = gallery.ids[rows.start : rows.stop]
        locators = gallery.locators[rows.start : rows.stop]
        return Unit(part, role, block, ids, locators, tuple(range(len(rows))), (), todo)
    queries = dataset.queries[rows.start : rows.stop]
    references = list(dict.fromkeys(query.reference for query in queries))
    index = {id: n for n, id in enumerate(references)}
    return Unit(
        part,
        role,
        block,
        tuple(query.id for query in queries),
        tuple(gallery.locators[gallery.position(id)] for id in references),
        tuple(index[query.reference] for query in queries),
        tuple(query.captions for query in queries),
        todo,
    )


def encode(parts: Sequence[Part], pools: Sequence[ModelConfig], shown: Progress) -> None:
    """Encode every unfinished block; needs a Ray session.

    Args:
        parts: stores that receive features and quarantine, with what opens their images.
        pools: one a model, settled.
        shown: counts blocks, once per model.

    Raises:
        ConfigError: the pools do not fit the cluster.
    """
    import ray.data

    names = [pool.name for pool in pools]
    units = [unit for n, part in enumerate(parts) for unit in plan_units(n, *part, names)]
    if not units:
        return
    busy = {model for unit in units for model in unit.todo}
    pools = [pool for pool in pools if pool.name in busy]
    cpus = available_cpus()
    share = actor_cpus(cpus, pools)
    one_unit = {"batch_size": 1, "batch_format": "pyarrow"}
    stream = ray.data.from_arrow([pack(unit) for unit in units]).map_batches(
        Decoder,
        fn_constructor_kwargs={"parts": [(store, dataset.source) for store, dataset in parts]},
        compute=ray.data.ActorPoolStrategy(size=max(1, int(cpus / CPUS_A_DECODER))),
        num_cpus=DECODE_CPUS,
        resources=cpu_resources(),
        zero_copy_batch=True,
        **one_unit,
    )
    for pool in pools:
        stream = stream.map_batches(
            Encoder,
            fn_constructor_kwargs={
                "parts": [(store, dataset.source) for store, dataset in parts],
                "pool": pool,
                "last": pool is pools[-1],
            },
            compute=ray.data.ActorPoolStrategy(
                size=pool.actors, max_tasks_in_flight_per_actor=IN_FLIGHT
            ),
            # On a node with a GPU that decoders have filled, an encoder of it would never start.
            num_cpus=0 if pool.num_gpus else share,
            num_gpus=float(pool.num_gpus) or None,
            resources={} if pool.num_gpus else cpu_resources(),
            zero_copy_batch=True,
            **one_unit,
        )
    for encoded in map(arrived, stream.iter_batches(**one_unit)):
        shown.advance(*encoded)


def actor_cpus(cpus: float, pools: Sequence[ModelConfig]) -> float:
    """CPUs an encoder without a GPU may claim so that decoders always find some; a starved pool
    hangs silently.

    Raises:
        ConfigError: too many actors.
    """
    actors = sum(pool.actors for pool in pools if not pool.num_gpus)
    if not actors:
        return 0.0
    budget = cpus - max(1.0, cpus / CPUS_A_DECODER) if cpus >= 2 else cpus - DECODE_CPUS
    share = min(1.0, int(100 * budget / actors) / 100)
    if share <= 0:
        raise ConfigError(
            f"{actors} actors do not fit {cpus:g} CPUs; lower `actors` of the models, "
            "or start Ray with more CPUs"
        )
    return share


class Decoder:
    """An actor that decodes a unit's images and lists those that cannot be used."""

    def __init__(self, parts: Sequence[tuple[TileStore, ImageSource]]) -> None:
        self.parts = parts

    def __call__(self, table: pa.Table) -> pa.Table:
        """Pass the unit on with its images."""
        return staged(self._decode, table)

    def _decode(self, unit: Unit) -> Unit:
        store, source = self.parts[unit.part]
        images: list[Image.Image | str | Usable] = []
        pixels = 0
        for locator, image in zip(unit.locators, opened(source, unit.locators), strict=True):
            if not isinstance(image, str):
                pixels += 3 * image.width * image.height
            images.append(
                image if isinstance(image, str) or pixels <= UNIT_BYTES else Usable(locator)
            )
        failures = [
            Failure(unit.role, id, reason)
            for id, index in zip(unit.ids, unit.image_index, strict=True)
            if isinstance(reason := images[index], str)
        ]
        if failures:
            store.quarantine(unit.role, unit.block, failures)
        return replace(unit, images=tuple(images))


class Encoder:
    """An actor of one model's pool. It loads its model at the first unit, so that weights which do
    not fit are explained: an actor that dies while it starts takes its reason along.
    """

    def __init__(
        self, parts: Sequence[tuple[TileStore, ImageSource]], pool: ModelConfig, last: bool
    ) -> None:
        one_thread()
        self.parts = parts
        self._one_at_a_time = threading.Lock()
        self.pool = pool
        self.last = last
        self._forwards: dict[tuple[Precision, int], Forward] = {}

    @cached_property
    def model(self) -> "FrozenModel":
        """The pool's model."""
        from dafm_ray.models.registry import load_model

        return load_model(self.pool.id)

    def forward(self, store: TileStore) -> "Forward":
        """The model on its device, as the manifest of a store says it encodes."""
        from dafm_ray.tiles.forward import Forward, device_of

        entry = store.manifest.models[self.pool.name]
        how = entry.precision, entry.batch
        if how not in self._forwards:
            device = device_of(float(self.pool.num_gpus))
            self._forwards[how] = Forward(self.model, device, *how)
        return self._forwards[how]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Commit the block if this model has not; pass the unit on, or a count at the end.

        Ray Data calls an actor again from another thread when it takes a unit for lost.
        """
        with self._one_at_a_time:
            return staged(self._encode, table)

    def _encode(self, unit: Unit) -> Unit | Encoded:
        if self.pool.name in unit.todo:
            store, source = self.parts[unit.part]
            images = [
                partial(source.open, image.locator) if isinstance(image, Usable) else image
                for image in unit.images
            ]
            features = self.forward(store)(images, unit.image_index, unit.captions)
            model = self.model
            texts = zip(unit.ids, unit.captions, strict=False)  # a gallery has none
            cut = [id for id, captions in texts if model.cuts(model.caption(captions))]
            if cut:
                store.list_cut(self.pool.name, unit.block, cut)
            store.write(feature_key(self.pool.name, unit.role, unit.block), features)
        if not self.last:
            return unit
        failed = sum(isinstance(unit.images[index], str) for index in unit.image_index)
        return Encoded(len(unit.todo), failed)
