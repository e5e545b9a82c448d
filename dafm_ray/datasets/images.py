"""Safe decoding of image files.

An image keeps its stored colour mode, because published preprocessing pads, resizes and crops
before it converts to RGB. Stated results for the odd ones: of an animation the first frame; EXIF
orientation is applied; 16-bit greyscale is scaled to 8 bits.
"""

import functools
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dafm_ray.errors import DataError
from dafm_ray.storage import RemoteStorage
from dafm_ray.uris import is_uri, local_path, shown

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


@dataclass(frozen=True)
class NoImages:
    """The source of a data set whose images are not at hand."""

    def open(self, locator: str) -> Image.Image:
        """There is nothing to open."""
        raise ImageError("the images are not at hand")


class StoredImages(Protocol):
    """An `ImageSource` of encoded files."""

    def read(self, locator: str) -> bytes:
        """Bytes of one image file.

        Raises:
            ImageError: it is missing or cannot be read.
        """
        ...


@dataclass(frozen=True)
class ImageFiles(ABC):
    """Image files below one folder; a locator is a path relative to it.

    Attributes:
        root: the folder; empty where the images are not at hand.
    """

    root: str

    def open(self, locator: str) -> Image.Image:
        """Read and decode one file."""
        return decode(self.read(locator))

    @abstractmethod
    def read(self, locator: str) -> bytes:
        """Read one file; a path that leaves the folder is refused."""

    @abstractmethod
    def versions(self, locators: Sequence[str]) -> list[str]:
        """What changes when a file is replaced under its name, without opening it: its size and
        time of change; empty if it is missing.
        """


def image_files(root: str) -> ImageFiles:
    """The image files below a folder or a URI."""
    if is_uri(root):
        return RemoteFiles(root)
    return Files(str(local_path(root)) if root else "")


def leaves(locator: str) -> bool:
    """Whether a locator, as it is written, leads out of the folder."""
    path = PurePosixPath(locator)
    return path.is_absolute() or ".." in path.parts


class Files(ImageFiles):
    """Image files on this machine or on a mounted disk."""

    def read(self, locator: str) -> bytes:
        """Read one file; a path that leaves the folder is refused."""
        root = Path(self.root).resolve()
        try:
            path = (root / locator).resolve()
            if not path.is_relative_to(root):
                raise ImageError(f"the path {locator!r} leaves {self.root}")
            return path.read_bytes()
        except FileNotFoundError:
            raise ImageError("the file is missing") from None
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ImageError(f"{locator!r} is not a path: {error}") from None

    def versions(self, locators: Sequence[str]) -> list[str]:
        """Ask for one file after the other."""
        return [self._version(locator) for locator in locators]

    def _version(self, locator: str) -> str:
        with suppress(OSError, ValueError):
            stat = (Path(self.root) / locator).stat()
            return f"{stat.st_size} {stat.st_mtime_ns}"
        return ""


class RemoteFiles(ImageFiles):
    """Image files behind a URI. A busy server is a MachineError, and no fault of the image."""

    def read(self, locator: str) -> bytes:
        """Download one file; a path that leaves the folder is refused."""
        if leaves(locator):
            raise ImageError(f"the path {locator!r} leaves {shown(self.root)}")
        if "\0" in locator:  # S3's client would ask for what stands before it
            raise ImageError(f"{locator!r} is not a path")
        try:
            data: bytes = _opened(self.root).read(_plain(locator)).to_pybytes()
        except FileNotFoundError:
            raise ImageError("the file is missing") from None
        return data

    def versions(self, locators: Sequence[str]) -> list[str]:
        """List the folder once."""
        found = _opened(self.root).versions("")
        return [found.get(_plain(locator), "") for locator in locators]


def _plain(locator: str) -> str:
    """Without `./` and `//`, which are part of an object's name."""
    return str(PurePosixPath(locator))


@functools.cache
def _opened(uri: str) -> RemoteStorage:
    """One client a process, however many copies of a source are sent there."""
    return RemoteStorage(uri)
