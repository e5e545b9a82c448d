"""How a pool shall encode: batch, precision and share of a GPU, measured once before it starts."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from dafm_ray.config import ModelConfig, Precision
from dafm_ray.errors import ConfigError, MachineError
from dafm_ray.models.base import FrozenModel
from dafm_ray.models.registry import load_model, resolve
from dafm_ray.progress import Progress
from dafm_ray.session import Row, explained, finished, one_thread
from dafm_ray.tiles.forward import Forward, device_of, precision_of
from dafm_ray.tiles.store import TileStore

WORTH_IT = 1000
"""Items of a store below which no batch is measured on a CPU."""

UNMEASURED_BATCH = 16
GROWTH = 4
PASSES = 4
"""Batches of one timing: on a GPU the next are preprocessed meanwhile."""

SLOW_S = 4.0
"""After a timing that takes longer no larger batch is tried; two sizes always are."""

NEAR = 0.95
"""Of the batches this near to the best rate the smallest is taken: it needs the least memory."""

LONG_CAPTION = "word " * 300
GPU_MARGIN, GPU_CONTEXT_BYTES, GPU_STEP = 1.2, 600_000_000, 0.05


@dataclass(frozen=True)
class Measured:
    """What one pool needs.

    Attributes:
        batch: items of one forward pass.
        precision: `fp32`, `bf16` or `fp16`.
        num_gpus: of an actor; a measured share holds the memory its passes fill.
        rate: items an actor encodes in a second; 0 if that was not measured.
    """

    batch: int
    precision: Precision
    num_gpus: float = 0.0
    rate: float = 0.0


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
        MachineError: torch cannot use the GPU that Ray gave, or a model does not fit it.
    """
    settled, claimed = [], []
    for pool in pools:
        entry = store.manifest.models[pool.name]
        wanted = replace(pool, batch=entry.batch, precision=entry.precision)
        measured = _needed(wanted, store, cluster_gpus)
        store.fix_encoding(pool.name, measured.batch, measured.precision)
        settled.append(replace(pool, num_gpus=measured.num_gpus))
        elsewhere = resolve(pool.id)[0].gpus_elsewhere()
        claimed.append(replace(pool, num_gpus=elsewhere or measured.num_gpus))
        shown.advance()
    check_gpus(claimed, cluster_gpus)
    return settled


def _needed(pool: ModelConfig, store: TileStore, cluster_gpus: float) -> Measured:
    """What a pool takes; measured only where the manifest and the pool leave it open."""
    block = store.manifest.grid.encode_block
    batch = min(pool.batch, block)
    if not resolve(pool.id)[0].runs_here:
        if pool.num_gpus not in (0, "auto") or pool.precision not in ("fp32", "auto"):
            raise ConfigError(f"{pool.name} runs in another process: num_gpus 0, precision fp32")
        return Measured(batch or min(UNMEASURED_BATCH, block), "fp32")
    if pool.num_gpus == "auto" and not cluster_gpus:
        pool = replace(pool, num_gpus=0.0)
    if pool.num_gpus == 0:
        if not batch and store.size("gallery") + store.size("queries") < WORTH_IT:
            batch = min(UNMEASURED_BATCH, block)
        if batch:
            return Measured(batch, precision_of(pool.precision, "cpu"))
    if pool.num_gpus != "auto" and batch and pool.precision != "auto":
        return Measured(batch, pool.precision, pool.num_gpus)
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
        pool = row["pool"]
        measured = measure(load_model(pool.id), pool, row["block"], device_of(row["gpus"]))
        return {"measured": measured}

    return explained(measured, row)


def measure(model: FrozenModel, pool: ModelConfig, block: int, device: str) -> Measured:
    """Time passes of growing batches.

    Args:
        model: of the pool.
        pool: a batch that is set is not sized again.
        block: largest batch; on a GPU half of it, so that preprocessing and encoding overlap.
        device: torch device.

    Raises:
        MachineError: not even the smallest batch fits the GPU.
    """
    precision = precision_of(pool.precision, device)
    limit = block if device == "cpu" else max(1, block // 2)
    batches = [min(pool.batch, block)] if pool.batch else growing(limit)
    pixels = np.random.default_rng(0).integers(0, 255, (400, 300, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    rates: dict[int, float] = {}
    for batch in batches:
        try:
            forward = Forward(model, device, precision, batch)
            forward([picture] * batch, range(batch))  # what runs first also allocates
            items = min(PASSES * batch, block)
            started = time.perf_counter()
            forward([picture] * items, range(items))
            seconds = time.perf_counter() - started
        except MachineError:
            if not rates:
                raise
            break
        rates[batch] = items / seconds
        if seconds > SLOW_S and len(rates) > 1:
            break
    batch = chosen(rates)
    if device == "cpu":
        return Measured(batch, precision, rate=rates[batch])
    share = _share(Forward(model, device, precision, batch), picture)
    return Measured(batch, precision, share, rates[batch])


def growing(limit: int) -> list[int]:
    """1, 4, 16, ... and the limit itself."""
    sizes = [GROWTH**n for n in range(int(math.log(limit, GROWTH)) + 1)]
    return sorted({size for size in sizes if size < limit} | {limit})


def chosen(rates: Mapping[int, float]) -> int:
    """The smallest batch that is nearly as fast as the fastest."""
    best = max(rates.values())
    return min(batch for batch, rate in rates.items() if rate >= NEAR * best)


def _share(forward: Forward, picture: Image.Image) -> float:
    """Share of the GPU that passes over candidates and over queries of long texts fill."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    images, index = [picture] * forward.batch, range(forward.batch)
    forward(images, index)
    forward(images, index, [(LONG_CAPTION,)] * forward.batch)
    total = torch.cuda.get_device_properties(0).total_memory
    return gpu_share(torch.cuda.max_memory_reserved(), total)


def gpu_share(peak_bytes: int, total_bytes: int) -> float:
    """Steps of 0.05 of a GPU, with room for CUDA's context and for fragments; at most all of it."""
    needed = (GPU_MARGIN * peak_bytes + GPU_CONTEXT_BYTES) / total_bytes
    return min(1.0, round(math.ceil(needed / GPU_STEP) * GPU_STEP, 2))


def check_gpus(pools: Sequence[ModelConfig], cluster_gpus: float) -> None:
    """All pools run at once; one that waits for a GPU would hang without a word.

    Raises:
        ConfigError: they do not fit. A share lies on one GPU, so shares are packed, largest first.
    """
    shares = [float(p.num_gpus) for p in pools if p.num_gpus for _ in range(p.actors)]
    free = [1.0] * int(cluster_gpus)
    for share in sorted(shares, reverse=True):
        on_each = min(share, 1.0)
        rooms = [n for n, room in enumerate(free) if room + 1e-9 >= on_each]
        if len(rooms) < math.ceil(share):
            raise ConfigError(
                f"the pools need {sum(shares):g} GPUs in shares of at most one, and the cluster "
                f"has {cluster_gpus:g}; lower actors, num_gpus or batch, or encode fewer models "
                "at once"
            )
        for n in rooms[: math.ceil(share)]:
            free[n] -= on_each
