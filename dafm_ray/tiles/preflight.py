"""How a pool shall encode: batch, precision and share of a GPU, measured once before it starts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from dafm_ray.config import ModelConfig, Precision
from dafm_ray.errors import ConfigError
from dafm_ray.models.registry import load_model
from dafm_ray.progress import Progress
from dafm_ray.session import Row, explained, finished, one_thread
from dafm_ray.tiles.forward import Forward, device_of, precision_of
from dafm_ray.tiles.store import TileStore

WORTH_IT = 1000
"""Fewer items are encoded in the time a measurement takes."""

UNMEASURED_BATCH = 16
STEP = 4
SLOW_S = 2.0
"""A pass that takes longer is the last one tried."""

NEAR = 0.95
"""Of the batches this near to the best rate the smallest is taken: it needs the least memory."""

GPU_MARGIN, GPU_CONTEXT_BYTES, GPU_STEP = 1.2, 600_000_000, 0.05


@dataclass(frozen=True)
class Measured:
    """What one pool needs.

    Attributes:
        batch: items of one forward pass.
        precision: `fp32`, `bf16` or `fp16`.
        num_gpus: share of a GPU whose memory the passes fill; 0 on a CPU.
        items_per_second: candidates, preprocessing included, one actor; 0 if not measured.
    """

    batch: int
    precision: Precision
    num_gpus: float = 0.0
    items_per_second: float = 0.0


def settle(
    store: TileStore, pools: Sequence[ModelConfig], cluster_gpus: float, shown: Progress
) -> list[ModelConfig]:
    """Fix batch and precision of every pool in the manifest, where they are not yet.

    Args:
        store: holds the models.
        pools: as configured.
        cluster_gpus: of the Ray session.
        shown: counts pools.

    Returns:
        The pools with a number for `num_gpus`.

    Raises:
        ConfigError: the pools need more GPUs than there are.
        MachineError: torch cannot use the GPU that Ray gave.
    """
    settled = []
    for pool in pools:
        entry = store.manifest.models[pool.name]
        wanted = replace(pool, batch=entry.batch, precision=entry.precision)
        measured = _needed(wanted, store, cluster_gpus)
        store.fix_encoding(pool.name, measured.batch, measured.precision)
        settled.append(replace(pool, num_gpus=measured.num_gpus))
        shown.advance()
    check_gpus(settled, cluster_gpus)
    return settled


def _needed(pool: ModelConfig, store: TileStore, cluster_gpus: float) -> Measured:
    block = store.manifest.grid.encode_block
    small = store.size("gallery") + store.size("queries") < WORTH_IT
    if pool.num_gpus == "auto" and not cluster_gpus:
        pool = replace(pool, num_gpus=0.0)
    if pool.num_gpus == 0 and (pool.batch or small):
        batch = min(pool.batch or UNMEASURED_BATCH, block)
        return Measured(batch, precision_of(pool.precision, "cpu"))
    return _measured_remotely(pool, block, cluster_gpus)


def _measured_remotely(pool: ModelConfig, block: int, cluster_gpus: float) -> Measured:
    import ray

    asked = pool.num_gpus
    gpus = 1.0 if asked == "auto" else asked
    check_gpus([replace(pool, num_gpus=gpus, actors=1)], cluster_gpus)
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_measure_row)
    row = finished(ray.get(remote.remote({"pool": pool, "block": block, "gpus": gpus})))
    measured: Measured = row["measured"]
    return measured if asked == "auto" else replace(measured, num_gpus=gpus)


def _measure_row(row: Row) -> Row:
    def measured() -> Row:
        one_thread()
        return {"measured": measure(row["pool"], row["block"], device_of(row["gpus"]))}

    return explained(measured, row)


def measure(pool: ModelConfig, block: int, device: str) -> Measured:
    """Load the pool's model and time passes of growing batches.

    Args:
        pool: a batch that is set is not sized again.
        block: largest batch.
        device: torch device.
    """
    model = load_model(pool.id)
    precision = precision_of(pool.precision, device)
    batches = [min(pool.batch, block)] if pool.batch else growing(block)
    pixels = np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8)
    rates: dict[int, float] = {}
    for batch in batches:
        forward = Forward(model, device, precision, batch)
        images = [Image.fromarray(pixels)] * batch
        index = range(batch)
        try:
            forward(images[:1], [0])  # what runs first also compiles and allocates
            started = time.perf_counter()
            forward(images, index)
            seconds = time.perf_counter() - started
            forward(images, index, [("a text",)] * batch)
        except torch.cuda.OutOfMemoryError:
            break
        rates[batch] = batch / seconds
        if seconds > SLOW_S:
            break
    if not rates:
        raise ConfigError(f"{pool.id} does not fit the GPU even with a batch of {batches[0]}")
    batch = chosen(rates)
    return Measured(batch, precision, _share(forward, images[:batch], device), rates[batch])


def growing(block: int) -> list[int]:
    """1, 4, 16, ... and the block itself."""
    sizes = [STEP**n for n in range(int(math.log(block, STEP)) + 1)]
    return sorted({size for size in sizes if size < block} | {block})


def chosen(rates: Mapping[int, float]) -> int:
    """The smallest batch that is nearly as fast as the fastest."""
    best = max(rates.values())
    return min(batch for batch, rate in rates.items() if rate >= NEAR * best)


def _share(forward: Forward, images: Sequence[Image.Image], device: str) -> float:
    """Share of the GPU that passes of this size fill."""
    if device == "cpu":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    forward.batch = len(images)
    forward(images, range(len(images)))
    forward(images, range(len(images)), [("a text",)] * len(images))
    total = torch.cuda.get_device_properties(0).total_memory
    return gpu_share(torch.cuda.max_memory_reserved(), total)


def gpu_share(peak_bytes: int, total_bytes: int) -> float:
    """Steps of 0.05 of a GPU, with room for CUDA's context and for fragments; at most all of it."""
    needed = (GPU_MARGIN * peak_bytes + GPU_CONTEXT_BYTES) / total_bytes
    return min(1.0, round(math.ceil(needed / GPU_STEP) * GPU_STEP, 2))


def check_gpus(pools: Sequence[ModelConfig], cluster_gpus: float) -> None:
    """All pools run at once; one that waits for a GPU would hang without a word.

    Raises:
        ConfigError: they need more than there are.
    """
    needed = sum(pool.actors * float(pool.num_gpus) for pool in pools)
    if needed > cluster_gpus + 1e-6:
        raise ConfigError(
            f"the pools need {needed:g} GPUs and the cluster has {cluster_gpus:g}; lower num_gpus "
            "or actors, or encode fewer models at once"
        )
