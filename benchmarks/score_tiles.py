"""P1: one similarity tile, committed, against a bare matmul into an array and one write."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import ratio
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.similarity import padded, score_block
from dafm_ray.tiles.store import TileStore
from tests.samples import labelled_dataset

QUERIES, CANDIDATES, WIDTH = 2048, 20_000, 256


def run() -> float:
    """Ratio of bare to ours, one thread."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    gallery = rng.standard_normal((CANDIDATES, WIDTH), dtype=np.float32)
    out = np.empty((QUERIES, CANDIDATES), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = TileStore.create(
            f"{folder}/store",
            labelled_dataset(9, 3),
            {},
            {"a": ModelEntry("clip4cir:sum@random-tiny", "a")},
            Grid(1, QUERIES, CANDIDATES),
            "float32",
        )
        candidates = padded(gallery)

        def ours() -> None:
            tile = score_block("clip4cir:sum@random-tiny", queries, candidates, "cpu")
            store.write("scores/a/00000-00000", tile[:QUERIES, :CANDIDATES])

        def bare() -> None:
            torch.matmul(torch.from_numpy(queries), torch.from_numpy(gallery).T, out=tensor)
            Path(folder, "bare.bin").write_bytes(out.data.cast("B"))

        tensor = torch.from_numpy(out)
        return ratio(ours, bare)
