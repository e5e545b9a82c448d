"""Copies of remote files on this machine's disk, up to a limit; the least recently used ones go.

Files are named by what they hold, so a copy is never out of date. Processes share a folder: a copy
takes its name when it is whole, and one that is removed stays readable where it is mapped.

    DAFM_CACHE      folder; default: dafm_ray in $XDG_CACHE_HOME, or in ~/.cache
    DAFM_CACHE_GB   limit in 10^9 bytes; default: 20; 0 keeps nothing
"""

import atexit
import fcntl
import functools
import hashlib
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import pyarrow as pa
import xxhash
from pyarrow import fs

from dafm_ray.errors import ConfigError, DataError, MachineError, refusals
from dafm_ray.remote import open_filesystem, retried
from dafm_ray.uris import shown

FOLDER, LIMIT = "DAFM_CACHE", "DAFM_CACHE_GB"
"""Environment variables."""

DEFAULT_GB = 20.0

_KEPT_AFTER = 0.9
"""Share of the limit that is left when it was passed, so that not every new file makes room."""

_SHARE = 16
"""A process looks at the folder after it has filled this part of what was free: others fill too."""

_ABANDONED_S = 3600.0
_CHUNK = 16 << 20


class Cache:
    """A folder of copies.

    Attributes:
        folder: made when something is kept.
        limit: bytes of all copies.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._sound: set[str] = set()
        self._room = 0

    def read(
        self, name: str, download: Callable[[], pa.Buffer], is_sound: Callable[[pa.Buffer], bool]
    ) -> pa.Buffer:
        """A file's bytes, mapped from the copy; the file itself where there is none or a bad one.

        Args:
            name: of the copy; stands for these bytes and no others.
            download: reads the file itself.
            is_sound: whether bytes are the right ones; asked at the first open in this process.
        """
        path = self.path(name)
        kept = _mapped(path)
        if kept is not None and (name in self._sound or is_sound(kept)):
            self._sound.add(name)
            return kept
        data = download()
        if not is_sound(data) or data.size > self.limit:
            return data
        with suppress(OSError):  # a full disk, a read-only home: it works without copies
            with self.filling(name, data.size) as temporary:
                temporary.write_bytes(memoryview(data))
            self._sound.add(name)
            return _mapped(path) or data
        return data

    def find(self, pattern: str) -> Path | None:
        """A copy by a pattern of its name, which is now the last one used."""
        for path in self.folder.glob(f"??/{pattern}"):
            with suppress(OSError):
                os.utime(path)
                return path
        return None

    @contextmanager
    def filling(self, name: str, size: int) -> Iterator[Path]:
        """A temporary file that becomes a copy, of at most `limit` bytes.

        Raises:
            OSError: the disk refuses.
        """
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if size > self._room:
            self._make_room(path)
        self._room -= size

    def path(self, name: str) -> Path:
        """Where a copy lies, if there is one."""
        return self.folder / name[:2] / name

    def _make_room(self, new: Path) -> None:
        """Remove the least recently used copies if there are too many; never the new one."""
        with self.locked("lock"):
            kept: list[tuple[float, int, Path]] = []
            for path in self.folder.glob("??/*"):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix == ".tmp" and time.time() - stat.st_mtime > _ABANDONED_S:
                        path.unlink()
                    else:
                        kept.append((stat.st_mtime, stat.st_size, path))
            total = sum(size for _, size, _ in kept)
            if total > self.limit:
                for _, size, path in sorted(kept):
                    if total <= _KEPT_AFTER * self.limit:
                        break
                    if path != new and path.suffix != ".tmp":
                        path.unlink(missing_ok=True)
                        total -= size
            self._room = max(0, self.limit - total) // _SHARE

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """One process at a time."""
        with (self.folder / f".{name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _mapped(path: Path) -> pa.Buffer | None:
    """A copy's bytes; None if there is none."""
    try:
        with suppress(OSError):  # somebody else's file
            os.utime(path)
        with pa.memory_map(str(path)) as mapped:
            return mapped.read_buffer()
    except (OSError, pa.ArrowInvalid):
        return None


def open_cache() -> Cache | None:
    """The cache that the environment names; None if it is turned off.

    Raises:
        ConfigError: its limit is no number.
    """
    text = os.environ.get(LIMIT, "") or str(DEFAULT_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise ConfigError(
            f"{LIMIT}={text}: it must be a number of gigabytes; 0 turns the cache off"
        )
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get(FOLDER) or f"{base}/dafm_ray"
    return _cache(folder, int(limit * 1e9)) if limit else None


@functools.cache
def _cache(folder: str, limit: int) -> Cache:
    return Cache(Path(folder).expanduser().absolute(), limit)


def local_copy(uri: str) -> Path:
    """A file behind a URI on this machine's disk, for libraries that read files alone.

    It is fetched again when its size or time has changed. A copy says in its name what it holds,
    which is verified at its first use in a process. Without a cache, or where it is larger than the
    cache, it lies in a temporary folder that ends with the process.

    Raises:
        FileNotFoundError: there is none.
        MachineError: it cannot be read, or there is no room for it.
    """
    filesystem, path = open_filesystem(uri, tries=1)
    info = retried(lambda: filesystem.get_file_info(path), "read", uri)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(uri)
    made_of = f"{shown(uri)} {info.size} {info.mtime_ns}"
    identity = hashlib.blake2b(made_of.encode(), digest_size=16).hexdigest()
    suffix = PurePosixPath(path).suffix
    cache = open_cache()
    if cache is None or info.size > cache.limit or not _is_writable(cache.folder):
        cache = _scratch()
    # The actors of a machine want the same weights at the same time: one of them fetches.
    with refusals(cache.folder), cache.locked(identity):
        kept = cache.find(f"{identity}-*{suffix}")
        if kept is not None:
            if str(kept) in _verified or _digest(kept) == kept.stem.partition("-")[2]:
                _verified.add(str(kept))
                return kept
            kept.unlink(missing_ok=True)
        return _fetched(filesystem, path, uri, info.size, cache, identity)


def _is_writable(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def read_part(uri: str, start: int, size: int) -> bytes:
    """Some bytes of a file behind a URI.

    Raises:
        DataError: there is none.
        MachineError: it cannot be read.
    """
    filesystem, path = open_filesystem(uri, tries=1)

    def part() -> bytes:
        with filesystem.open_input_file(path) as file:
            data: bytes = file.read_at(size, start)
        return data

    try:
        return retried(part, "read", uri)
    except FileNotFoundError:
        raise DataError(f"there is no file {shown(uri)}") from None


def _fetched(
    filesystem: fs.FileSystem, path: str, uri: str, size: int, cache: Cache, identity: str
) -> Path:
    temporary = cache.path(f"in{uuid.uuid4().hex}.tmp")
    temporary.parent.mkdir(exist_ok=True)
    try:
        _download(filesystem, path, uri, size, temporary)
        name = f"{identity}-{_digest(temporary)}{PurePosixPath(path).suffix}"
        with cache.filling(name, size) as copy:
            temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    _verified.add(str(cache.path(name)))
    return cache.path(name)


_verified: set[str] = set()
"""Copies that this process has verified."""


def _download(filesystem: fs.FileSystem, path: str, uri: str, size: int, to: Path) -> None:
    """Fetch a file part by part; a part that fails is fetched again, not the whole."""

    def part(start: int) -> bytes:
        with filesystem.open_input_file(path) as file:
            data: bytes = file.read_at(min(_CHUNK, size - start), start)
        if len(data) < min(_CHUNK, size - start):
            raise ConnectionError(f"{shown(uri)} ended early")
        return data

    with to.open("wb") as file:
        for start in range(0, size, _CHUNK):
            file.write(retried(functools.partial(part, start), "read", uri))


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


@functools.cache
def _scratch() -> Cache:
    """A folder of this process alone."""
    try:
        folder = tempfile.mkdtemp(prefix="dafm_ray-")
    except OSError as error:
        raise MachineError(f"there is no temporary folder: {error}") from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Cache(Path(folder), 1 << 62)
