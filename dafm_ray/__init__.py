"""Composed image retrieval on Ray: run frozen models over a gallery, fuse their scores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dafm_ray.datasets.registry import load_dataset
    from dafm_ray.fusion.artefact import load_artefact
    from dafm_ray.fusion.base import Fusion
    from dafm_ray.fusion.lightfusion import LightFusion
    from dafm_ray.fusion.train import train_fusion
    from dafm_ray.models.registry import load_model
    from dafm_ray.report.evaluate import evaluate
    from dafm_ray.tiles.precompute import precompute
    from dafm_ray.tiles.store import TileStore

__all__ = [
    "load_dataset",
    "load_model",
    "precompute",
    "TileStore",
    "LightFusion",
    "Fusion",
    "train_fusion",
    "load_artefact",
    "evaluate",
]

_HOMES = {
    "load_dataset": "dafm_ray.datasets.registry",
    "load_model": "dafm_ray.models.registry",
    "precompute": "dafm_ray.tiles.precompute",
    "TileStore": "dafm_ray.tiles.store",
    "LightFusion": "dafm_ray.fusion.lightfusion",
    "Fusion": "dafm_ray.fusion.base",
    "train_fusion": "dafm_ray.fusion.train",
    "load_artefact": "dafm_ray.fusion.artefact",
    "evaluate": "dafm_ray.report.evaluate",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `dafm --help` answers without torch and Ray."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dafm_ray' has no attribute {name!r}")
