"""Did a model learn from the queries that a fusion learns from? Then its scores flatter it."""

from dafm_ray.datasets.base import label_of
from dafm_ray.models.checkpoints import trained_on
from dafm_ray.tiles.store import TileStore


def learned_from(store: TileStore, model: str) -> list[str]:
    """Labels of the data that a model's weights say they learned from; empty if they say nothing,
    or are not at hand.
    """
    return trained_on(store.manifest.models[model].id.partition("@")[2])


def has_seen(store: TileStore, model: str) -> bool:
    """Whether a model's weights say that they learned from the queries of a store."""
    spec = store.manifest.dataset
    where = spec.get("category", ""), spec.get("root", "")
    return label_of(spec["name"], spec["split"], *where) in learned_from(store, model)
