"""JPEGs to measure with, each another picture."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (400, 300)


def write_jpegs(root: Path, numbers: Iterable[int]) -> None:
    """Write `000000.jpg` and so on, smooth enough to compress like photos."""
    for n in numbers:
        coarse = np.random.default_rng(n).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        image.save(root / f"{n:06d}.jpg", quality=90)
