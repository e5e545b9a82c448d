"""Safe decoding of image files.

An image keeps its stored colour mode, because published preprocessing pads, resizes and crops
before it converts to RGB. Stated results for the odd ones: of an animation the first frame; EXIF
orientation is applied; 16-bit greyscale is scaled to 8 bits.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dafm_ray.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""File names that are taken for images."""

MAX_PIXELS = 100_000_000
"""Larger images are refused as decompression bombs before a pixel is decoded."""

_KEPT_BLOCKS = 4
# Pillow gives the memory of every image back to the system and asks for it again: half the time
# of decoding a small JPEG. A few blocks of at most 16 MB are kept instead.
Image.core.set_blocks_max(_KEPT_BLOCKS)  # type: ignore[attr-defined]


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
            if image.mode.startswith("I"):
                image = _to_eight_bits(image)
            elif image.mode not in _PLAIN_MODES:
                image = image.convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image (begins with {data[:12]!r})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them
        raise ImageError(f"cannot be decoded: {error}") from None
    return image


def oddities(data: bytes) -> tuple[str, ...]:
    """What decoding does to an image beyond reading it, as `CMYK: converted to RGB`.

    Args:
        data: an image file that `decode` accepts.
    """
    with Image.open(io.BytesIO(data)) as opened:
        found = [text for mode, text in _ODD_MODES.items() if opened.mode == mode]
        if opened.mode.startswith("I"):
            found.append("16 bits a pixel: scaled to 8")
        if getattr(opened, "is_animated", False):
            found.append("several frames: the first is used")
        orientation = opened.getexif().get(_ORIENTATION, 1)
        if orientation in range(2, 9):
            found.append(f"EXIF orientation {orientation}: applied")
    return tuple(found)


_ORIENTATION = 0x0112
_PLAIN_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "F"})
_ODD_MODES = {
    "CMYK": "CMYK: converted to RGB by the model",
    "P": "palette: converted to RGB by the model",
    "RGBA": "transparency: dropped by the model",
    "LA": "transparency: dropped by the model",
    "F": "floating point: clipped to 8 bits by the model",
}


def _to_eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.int64)
    return Image.fromarray((pixels.clip(0, 65535) >> 8).astype(np.uint8))
