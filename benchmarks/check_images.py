"""Images a second through decode and check, against a bare decoding loop on every CPU.

DAFM_BENCH_IMAGES sets how many JPEGs are generated (400 x 300 pixels, each another picture).
Prints the peak of anonymous memory over the first and the second half of the images: flat if equal.
"""

import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path

import psutil
from PIL import Image

from benchmarks.pictures import write_jpegs
from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.check import check
from dafm_ray.session import ensure_ray

IMAGES = int(os.environ.get("DAFM_BENCH_IMAGES", "40000"))
BARE = 10_000
CPUS = os.cpu_count() or 1


def run() -> float:
    """Ratio of our rate to that of bare decoding on all CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chunks = [range(start, min(start + 500, IMAGES)) for start in range(0, IMAGES, 500)]
        with ProcessPoolExecutor(CPUS) as pool:
            list(pool.map(write_jpegs, [root] * len(chunks), chunks))
            query = '{"id": "q", "reference": "000000.jpg", "text": "x", "target": "000001.jpg"}'
            (root / "queries.jsonl").write_text(query)
            parts = [range(n, min(BARE, IMAGES), CPUS) for n in range(CPUS)]
            started = time.perf_counter()
            list(pool.map(_bare, [root] * len(parts), parts))
            bare = min(BARE, IMAGES) / (time.perf_counter() - started)
        ensure_ray()
        with _Memory() as memory:
            found = check(DatasetConfig("folder", root=folder))
        assert found.images_checked == IMAGES
        assert found.changes_metric == 0
        first, second = memory.halves()
        print(
            f"{IMAGES} images: {found.images_per_second:.0f} a second, bare {bare:.0f}; anonymous "
            f"memory of all processes, peak of each half: {first:.0f} MB, {second:.0f} MB"
        )
        return found.images_per_second / bare


def _bare(root: Path, numbers: range) -> None:
    for n in numbers:
        data = (root / f"{n:06d}.jpg").read_bytes()
        Image.open(BytesIO(data)).convert("RGB").load()


class _Memory:
    """Samples the anonymous memory of this process and its children."""

    def __enter__(self) -> "_Memory":
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(1.0):
            me = psutil.Process()
            self._samples.append(
                sum(_anonymous(process) for process in [me, *me.children(recursive=True)]) / 1e6
            )

    def halves(self) -> tuple[float, float]:
        """Peaks in MB."""
        middle = max(1, len(self._samples) // 2)
        return max(self._samples[:middle]), max(self._samples[middle:] or self._samples)


def _anonymous(process: psutil.Process) -> float:
    try:
        usage = process.memory_info()
        return float(usage.rss - usage.shared)
    except psutil.NoSuchProcess:
        return 0.0
