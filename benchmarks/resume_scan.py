"""R6: seconds to learn which of 10,000 tiles are finished."""

import tempfile
from pathlib import Path

from benchmarks.measure import seconds
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import TileStore, score_key
from tests.samples import labelled_dataset

TILES = 10_000


def run() -> float:
    """Seconds of one listing."""
    with tempfile.TemporaryDirectory() as folder:
        store = TileStore.create(
            folder,
            labelled_dataset(100, 100),
            {},
            {"a": ModelEntry("clip4cir:sum@random-tiny", "a")},
            Grid(1, 1, 1),
            "float32",
        )
        records = Path(folder, "records", "scores", "a")
        records.mkdir(parents=True)
        for key in store.score_keys("a"):
            Path(folder, "records", f"{key}.{'0' * 32}.json").touch()
        elapsed = seconds(store.missing)
        assert store.missing() == []
        assert len(store.score_keys("a")) == TILES
        assert score_key("a", 0, 0) in store.finished()
        return elapsed
