"""Opening a data set by name. A new one is a file and a row here."""

from collections.abc import Callable
from difflib import get_close_matches

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Dataset
from dafm_ray.datasets.folder import load_folder
from dafm_ray.datasets.icons import load_icons
from dafm_ray.errors import ConfigError

DATASETS: dict[str, Callable[[DatasetConfig], Dataset]] = {
    "icons": lambda config: load_icons(config.split),
    "folder": lambda config: load_folder(config.root),
}


def load_dataset(config: DatasetConfig) -> Dataset:
    """Open a data set.

    Raises:
        ConfigError: no such data set; names the nearest.
        DataError: its files are missing or do not fit together.
    """
    if config.name not in DATASETS:
        near = get_close_matches(config.name, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        known = ", ".join(DATASETS)
        raise ConfigError(f"there is no data set {config.name!r}{hint} Known: {known}")
    return DATASETS[config.name](config)
