"""Shortlists of large synthetic galleries: time, storage, memory, and what is lost.

    python -m benchmarks.scale --images 200000 --whole
    python -m benchmarks.scale --images 1000000

Four models see the same images through a noise of their own, 256 numbers an image, so fusing them
pays; a query lies near its target. Features are made, not encoded: an encoder's time grows with the
images alone, and `dafm precompute --plan` measures it.
"""

import argparse
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dafm_ray.config import EvaluateConfig, FusionConfig, Recipe
from dafm_ray.datasets.base import Dataset, Gallery, Query
from dafm_ray.fusion.train import train_fusion
from dafm_ray.progress import progress
from dafm_ray.report.audits.shortlist import audit_shortlist
from dafm_ray.report.evaluate import evaluate
from dafm_ray.search.index import Block
from dafm_ray.search.sharded import ShardedIndex
from dafm_ray.session import ensure_ray, quiet_data
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.shortlist import list_candidates
from dafm_ray.tiles.similarity import score_tiles
from dafm_ray.tiles.store import TileStore, feature_key, spans

WIDTH, LATENT = 256, 48
NOISE_OF_QUERIES, NOISE_OF_MODELS = 1.0, 0.7
GRID = Grid(encode_block=16384, tile_queries=512, tile_candidates=32768)


class Without:
    """Images that nobody opens."""

    def open(self, locator: str) -> Any:
        """Never called."""
        raise AssertionError(f"nothing opens {locator}")


def dataset_of(images: int, queries: int) -> Dataset:
    """Names alone."""
    rng = np.random.default_rng(0)
    targets, references = rng.permutation(images)[: 2 * queries].reshape(2, queries).tolist()
    return Dataset(
        name="synthetic",
        split="val",
        protocol="folder",
        policy="mask",
        gallery=Gallery.from_source({f"{n:09d}": "" for n in range(images)}),
        queries=tuple(
            Query(
                id=f"q{q:06d}",
                reference=f"{reference:09d}",
                captions=("",),
                targets=(f"{target:09d}",),
                excluded=(f"{reference:09d}",),
                fold_group=f"q{q:06d}",
            )
            for q, (target, reference) in enumerate(zip(targets, references, strict=True))
        ),
        source=Without(),
    )


def fill(root: Path, dataset: Dataset, models: Sequence[str], shortlist: int) -> TileStore:
    """A store of features; goes on where it stopped."""
    entries = {name: ModelEntry(f"zeroshot:sum@{name}", name, 1, "fp32") for name in models}
    spec = {"name": dataset.name, "split": dataset.split, "root": ""}
    store = TileStore.create(str(root), dataset, spec, entries, GRID, "float32", shortlist)
    rng = np.random.default_rng(1)
    latent_ND = rng.standard_normal((len(dataset.gallery), LATENT), np.float32)
    at_Q = [dataset.gallery.position(query.targets[0]) for query in dataset.queries]
    asked_QD = latent_ND[at_Q] + NOISE_OF_QUERIES * rng.standard_normal(
        (len(at_Q), LATENT), np.float32
    )
    done = store.finished()
    for m, name in enumerate(models):
        mixing_DW = np.random.default_rng(10 + m).standard_normal((LATENT, WIDTH), np.float32)
        for role, values in (("gallery", latent_ND), ("queries", asked_QD)):
            for block, rows in enumerate(spans(len(values), GRID.encode_block)):
                key = feature_key(name, role, block)  # type: ignore[arg-type]
                if key in done:
                    continue
                own = np.random.default_rng([m, len(role), block])
                seen = values[rows.start : rows.stop]
                seen = seen + NOISE_OF_MODELS * own.standard_normal(seen.shape, np.float32)
                features = seen @ mixing_DW
                features /= np.linalg.norm(features, axis=1, keepdims=True)
                store.write(key, features)
    return TileStore(store.uri)


@contextmanager
def anonymous_peak() -> Iterator[dict[str, float]]:
    """GB of anonymous memory of this process and all it started, at most."""
    found = {"peak": 0.0}
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            me = psutil.Process()
            total = 0
            for process in (me, *me.children(recursive=True)):
                with suppress(OSError, psutil.Error, StopIteration):
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    line = next(line for line in lines if line.startswith("Anonymous:"))
                    total += int(line.split()[1])
            found["peak"] = max(found["peak"], total / 1e6)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def folder_bytes(store: TileStore, kinds: Sequence[str]) -> int:
    """Of some folders of a store."""
    root = Path(store.uri)
    return sum(f.stat().st_size for kind in kinds for f in (root / kind).rglob("*.arrow"))


def timed(store: TileStore, models: Sequence[str], how: Any) -> float:
    """Seconds of a stage."""
    started = time.perf_counter()
    with progress("scores", len(models) * len(store.tile_rows), unit="tile") as shown:
        how(store, models, shown)
    return time.perf_counter() - started


def faiss_seconds(store: TileStore, models: Sequence[str], k: int, shards: int) -> float:
    """Seconds of finding each model's first `k` with faiss, a flat index over Ray actors.

    The candidates alone: not what the other models give them, nor the moments of all.
    """
    started = time.perf_counter()
    images, queries = store.size("gallery"), store.size("queries")
    for model in models:
        blocks = (
            Block(store.gallery_ids[rows.start : rows.stop], store.features(model, "gallery", rows))
            for rows in spans(images, GRID.encode_block)
        )
        with ShardedIndex(blocks, images, shards) as index:
            index.search(store.features(model, "queries", range(queries)), k)
    return time.perf_counter() - started


def main() -> None:
    """Run, and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1_024)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--shortlist", type=int, default=200)
    parser.add_argument("--whole", action="store_true", help="also score all, and compare")
    parser.add_argument(
        "--faiss", type=int, default=0, metavar="ACTORS", help="search with it, too"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/scale"))
    given = parser.parse_args()
    models = [f"m{m}" for m in range(given.models)]
    dataset = dataset_of(given.images, given.queries)
    root = given.root / str(given.images)
    shutil.rmtree(root, ignore_errors=True)
    found: dict[str, Any] = {key: str(value) for key, value in vars(given).items()}
    store = fill(root / "short", dataset, models, given.shortlist)
    found["features_GB"] = folder_bytes(store, ["features"]) / 1e9
    ensure_ray()
    quiet_data()
    with anonymous_peak() as memory:
        found["shortlist_s"] = timed(store, models, list_candidates)
        store = TileStore(store.uri)
    found["shortlist_memory_GB"] = memory["peak"]
    found["shortlist_MB"] = folder_bytes(store, ["scores", "columns", "moments"]) / 1e6
    if given.faiss:
        found["faiss_s"] = faiss_seconds(store, models, given.shortlist, given.faiss)
    config = FusionConfig(
        store.uri,
        str(root / "fusion"),
        bank_t=0,
        profiles=False,
        recipe=Recipe(epochs=2),
        cases=0,
    )
    with anonymous_peak() as memory:
        started = time.perf_counter()
        train_fusion(config)
        found["train_s"] = time.perf_counter() - started
        started = time.perf_counter()
        table = evaluate(
            EvaluateConfig(store.uri, str(root / "report"), ("mean@zscore", config.out), cases=0)
        ).table
        found["evaluate_s"] = time.perf_counter() - started
    found["train_memory_GB"] = memory["peak"]
    found["recalls"] = {
        row.name: {k: row.metrics[k] for k in ("R@1", "R@10", "R@50")}
        for row in table.rows
        if row.kind in ("single", "static", "learned")
    }
    if given.whole:
        whole = fill(root / "whole", dataset, models, 0)
        with anonymous_peak() as memory:
            found["whole_s"] = timed(whole, models, score_tiles)
        found["whole_memory_GB"] = memory["peak"]
        whole = TileStore(whole.uri)
        found["whole_GB"] = folder_bytes(whole, ["scores"]) / 1e9
        started = time.perf_counter()
        found["against all scores"] = audit_shortlist(store, whole, "mean@zscore").details
        found["audit_s"] = time.perf_counter() - started
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
