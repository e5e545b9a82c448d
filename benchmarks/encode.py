"""P2: images a second through the encode stage, against a bare loop over the same module.

The bare loop opens, preprocesses and encodes batch by batch in one process with one thread; ours
decodes in another process. Ours is timed between committed blocks, so that starting Ray and loading
weights do not count. A rate is the best of two runs: other work on the machine only slows. Weights
are random; images are JPEGs of 400 x 300 pixels. DAFM_BENCH_MODELS names the full-size models,
DAFM_BENCH_GPUS the GPUs of an actor.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.pictures import write_jpegs
from dafm_ray.config import DatasetConfig, ModelConfig
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.models.base import FrozenModel
from dafm_ray.models.registry import load_model
from dafm_ray.progress import progress
from dafm_ray.session import ensure_ray, quiet_data
from dafm_ray.tiles.encode import encode
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import TileStore

FAMILIES = ("clip4cir:sum", "tgcir:base", "blip4cir:stage1", "sprc:base")
FULL = os.environ.get("DAFM_BENCH_MODELS", "clip4cir:sum,tgcir:base").split(",")
GPUS = float(os.environ.get("DAFM_BENCH_GPUS", "0"))
DEVICE = "cuda" if GPUS else "cpu"
RUNS = 2


def tiny() -> float:
    """Lowest ratio of our rate to the bare one over the tiny architectures, one actor."""
    return min(_ratio(f"{name}@random-tiny", blocks=100, block=64) for name in FAMILIES)


def full() -> float:
    """The same over full-size architectures."""
    return min(_ratio(f"{name}@random", blocks=10, block=4) for name in FULL)


def two_actors() -> float:
    """Rate of two actors to that of one, full size."""
    with tempfile.TemporaryDirectory() as folder:
        root = _images(Path(folder), 96)  # actors commit in pairs: many small blocks hide that
        model = f"{FULL[-1]}@random"
        one = _best(lambda: _ours(model, root, 2, actors=1))
        two = _best(lambda: _ours(model, root, 2, actors=2))
    print(f"{FULL[-1]}: one actor {one:.3g}, two actors {two:.3g} images a second")
    return two / one


def _ratio(model_id: str, blocks: int, block: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        root = _images(Path(folder), blocks * block)
        bare = _best(lambda: _bare(model_id, root, block))
        ours = _best(lambda: _ours(model_id, root, block, actors=1))
    print(f"{model_id}: {ours:.3g} images a second, bare {bare:.3g}")
    return ours / bare


def _best(rate: Callable[[], float]) -> float:
    return max(rate() for _ in range(RUNS))


def _images(root: Path, count: int) -> Path:
    write_jpegs(root, range(count))
    (root / "queries.jsonl").write_text('{"id": "q", "reference": "000000.jpg", "text": "x"}')
    return root


def _bare(model_id: str, root: Path, block: int) -> float:
    torch.set_num_threads(1)
    model: FrozenModel = load_model(model_id)
    model.module.to(DEVICE)
    files = sorted(root.glob("*.jpg"))
    batches = [files[start : start + block] for start in range(0, len(files), block)]

    def run(batch: list[Path]) -> None:
        images = torch.stack([model.preprocess(Image.open(file)) for file in batch])
        model.encode_gallery(images.to(DEVICE)).cpu()

    with torch.inference_mode():
        run(batches[0])
        started = time.perf_counter()
        for batch in batches[1:]:
            run(batch)
        return block * (len(batches) - 1) / (time.perf_counter() - started)


def _ours(model_id: str, root: Path, block: int, actors: int) -> float:
    """Images a second between the first block that was committed and the last."""
    spec = DatasetConfig("folder", root=str(root))
    dataset = load_dataset(spec)
    with tempfile.TemporaryDirectory() as folder:
        entry = ModelEntry(model_id, "random", block, "fp32")
        grid = Grid(block, 1, 1)
        store = TileStore.create(folder, dataset, {}, {"a": entry}, grid, "float32")
        ensure_ray()
        quiet_data()
        with progress("encode", 1) as shown:
            encode([(store, dataset)], [ModelConfig("a", model_id, actors, GPUS)], shown)
        records = Path(folder, "records", "features", "a", "gallery").glob("*.json")
        times = sorted(record.stat().st_mtime for record in records)
    # By then every actor has loaded its model and worked off what was decoded meanwhile.
    counted = times[max(3 * actors, len(times) // 4) :]
    return block * (len(counted) - 1) / (counted[-1] - counted[0])
