"""Safe decoding of image files.

An image keeps its stored colour mode, because published preprocessing pads, resizes and crops
before it converts to RGB. Stated results for the odd ones: of an animation the first frame; EXIF
orientation is applied; 16-bit greyscale is scaled to 8 bits.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dafm_ray.errors import DataError

MAX_PIXELS = 100_000_000
"""Larger images are refused as decompression bombs before a pixel is decoded."""


class ImageError(DataError):
    """One image cannot be used; the message is the reason listed in the quarantine."""


def decode(data: bytes) -> Image.Image:
    """Decode an image file held in memory.

    Raises:
        ImageError: empty, unreadable, truncated, or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{width} x {height} pixels, more than {MAX_PIXELS} allowed")
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image (begins with {data[:12]!r})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them
        raise ImageError(f"cannot be decoded: {error}") from None
    return _to_eight_bits(image) if image.mode.startswith("I") else image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    return Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))


@dataclass(frozen=True)
class Files:
    """Image files below one folder; a locator is a path relative to it."""

    root: str

    def open(self, locator: str) -> Image.Image:
        """Read and decode one file; a path that leaves the folder is refused."""
        root = Path(self.root).resolve()
        path = (root / locator).resolve()
        if not path.is_relative_to(root):
            raise ImageError(f"the path {locator!r} leaves {self.root}")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ImageError("the file is missing") from None
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        return decode(data)
