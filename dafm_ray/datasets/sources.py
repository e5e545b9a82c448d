"""Where image files come from: a folder, a URI, nowhere; and opening many of them."""

import functools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Protocol

from PIL import Image

from dafm_ray.datasets.base import ImageSource
from dafm_ray.datasets.images import ImageError, decode
from dafm_ray.storage import RemoteStorage
from dafm_ray.uris import is_uri, local_path, shown


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


AT_ONCE = 16
"""Images behind a URI that are under way at a time: one alone waits for the server most of it."""


def opened(source: ImageSource, locators: Sequence[str]) -> Iterator[Image.Image | str]:
    """Images in the order of their locators, or why one cannot be used.

    Args:
        source: asked for several at a time if it says that it is remote.
        locators: of the images.
    """
    if not getattr(source, "is_remote", False):
        yield from (_image_or_reason(source, locator) for locator in locators)
        return
    pool = ThreadPoolExecutor(AT_ONCE)
    under_way: deque[Future[Image.Image | str]] = deque()
    try:
        for locator in locators:
            under_way.append(pool.submit(_image_or_reason, source, locator))
            if len(under_way) == AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_or_reason(source: ImageSource, locator: str) -> Image.Image | str:
    try:
        return source.open(locator)
    except ImageError as error:
        return str(error)


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

    is_remote: ClassVar = True

    def read(self, locator: str) -> bytes:
        """Download one file; a path that leaves the folder is refused."""
        if leaves(locator):
            raise ImageError(f"the path {locator!r} leaves {shown(self.root)}")
        if "\0" in locator:  # S3's client would ask for what stands before it
            raise ImageError(f"{locator!r} is not a path")
        try:
            data: bytes = _client(self.root).read(_plain(locator)).to_pybytes()
        except FileNotFoundError:
            raise ImageError("the file is missing") from None
        return data

    def versions(self, locators: Sequence[str]) -> list[str]:
        """List the folder once."""
        found = _client(self.root).versions("")
        return [found.get(_plain(locator), "") for locator in locators]


def _plain(locator: str) -> str:
    """Without `./` and `//`, which are part of an object's name."""
    return str(PurePosixPath(locator))


@functools.cache
def _client(uri: str) -> RemoteStorage:
    """One client a process, however many copies of a source are sent there."""
    return RemoteStorage(uri)
