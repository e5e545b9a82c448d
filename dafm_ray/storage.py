"""Where bytes of stores, runs and data sets lie: a local folder, or a URI of pyarrow's or fsspec's.

Both write a file whole or not at all. A local file is written under a temporary name, synced and
renamed; an object store shows an object only when its upload is complete, so there is nothing to
rename, and an upload that fails is done again from its start. docs/storage.md says more.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa
from pyarrow import fs

from dafm_ray.cache import open_cache
from dafm_ray.errors import MachineError, refusals
from dafm_ray.remote import OBJECT_STORES, Backoff, open_filesystem, retried
from dafm_ray.uris import above, is_uri, join, last_part, local_path

T = TypeVar("T")


class Storage(Protocol):
    """Files under one root, addressed by relative paths with `/`."""

    uri: str

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """A pyarrow filesystem, for others to use, and the root's path on it."""
        ...

    def place(self, path: str) -> Path | str:
        """A file's own path or URI."""
        ...

    def write(self, path: str, data: pa.Buffer) -> None:
        """Store a file whole or not at all, replacing one of that name."""
        ...

    def read(self, path: str) -> pa.Buffer:
        """A file's bytes; memory-mapped where the file is local.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def read_fixed(self, path: str, is_sound: Callable[[pa.Buffer], bool]) -> pa.Buffer:
        """Bytes of a file that never changes and is called by its digest, as `KEY.DIGEST.arrow`:
        mapped from this machine's cache where the file is remote.

        Args:
            path: of the file.
            is_sound: whether bytes have that digest. The file's own bytes may not; the caller says
                so.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        ...

    def has_folder(self, folder: str) -> bool:
        """Whether there is such a folder; the empty path stands for the root."""
        ...

    def list(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted; empty if there is no such folder."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file if it is there."""
        ...


def open_storage(uri: str) -> Storage:
    """Storage at a path or URI, as `runs/icons`, `file:///data/store` or `s3://bucket/store`."""
    return RemoteStorage(uri) if is_uri(uri) else LocalStorage(str(local_path(uri)))


@contextmanager
def results(out: str, last: str) -> Iterator[Path]:
    """A local folder to write results to; those of a URI are uploaded when all are written.

    Args:
        out: path or URI.
        last: the file that is uploaded after the others, so that what has it is whole.
    """
    if not is_uri(out):
        yield local_path(out)
        return
    storage = open_storage(out)
    with tempfile.TemporaryDirectory(prefix="dafm_ray-") as folder:
        root = Path(folder)
        yield root
        files = (path for path in root.rglob("*") if path.is_file())
        names = sorted(path.relative_to(root).as_posix() for path in files)
        for name in sorted(names, key=lambda name: name == last):
            storage.write(name, pa.py_buffer((root / name).read_bytes()))


@contextmanager
def result_file(where: str) -> Iterator[Path]:
    """A local file to write; that of a URI is uploaded when it is written.

    Args:
        where: path or URI.
    """
    name = last_part(where)
    with results(above(where), name) as folder:
        yield folder / name


@contextmanager
def fetched(where: str, names: Sequence[str]) -> Iterator[Path]:
    """A local folder with some files of a folder, for what can only read files.

    Args:
        where: path or URI of the folder; a path is given back.
        names: of the files; those that are not there are left out.
    """
    if not is_uri(where):
        yield local_path(where)
        return
    storage = open_storage(where)
    with tempfile.TemporaryDirectory(prefix="dafm_ray-") as folder:
        for name in names:
            with refusals(folder), suppress(FileNotFoundError):
                (Path(folder) / name).write_bytes(memoryview(storage.read(name)))
        yield Path(folder)


class LocalStorage:
    """A folder on this machine or on a mounted disk."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """The local filesystem and the folder."""
        return fs.LocalFileSystem(), self.uri

    def place(self, path: str) -> Path:
        """Its path."""
        return self.root / path

    def write(self, path: str, data: pa.Buffer) -> None:
        """Write under a temporary name, sync, rename."""
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with refusals(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(memoryview(data))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
            _sync_folder(target.parent)

    def read(self, path: str) -> pa.Buffer:
        """Map the file into memory."""
        target = self.root / path
        if target.stat().st_size == 0:
            return pa.py_buffer(b"")
        with pa.memory_map(str(target)) as mapped:
            return mapped.read_buffer()

    def read_fixed(self, path: str, is_sound: Callable[[pa.Buffer], bool]) -> pa.Buffer:
        """Map the file into memory."""
        return self.read(path)

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        return (self.root / path).is_file()

    def has_folder(self, folder: str) -> bool:
        """Whether there is such a folder."""
        return (self.root / folder).is_dir()

    def list(self, folder: str) -> list[str]:
        """Walk the folder. Links are listed wherever they lead, and never followed: one to a folder
        may lead outside, or in a circle. Temporary files are left out.
        """
        found: list[str] = []
        pending = [self.root / folder]
        while pending:
            with _scanned(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    elif not entry.name.endswith(".tmp") and _is_file(entry):
                        found.append(os.path.relpath(entry.path, self.root))
        return sorted(found)

    def delete(self, path: str) -> None:
        """Remove the file if it is there."""
        with suppress(FileNotFoundError):
            (self.root / path).unlink()


@contextmanager
def _scanned(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        yield iter(())
    except PermissionError:
        raise MachineError(f"cannot list {folder}: no permission to read it") from None
    else:
        with entries:
            yield entries


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file or a link; a pipe is neither, and reading it would never end."""
    return entry.is_symlink() or entry.is_file()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStorage:
    """Files behind a URI. What may pass is tried again; what may not is one clear error."""

    def __init__(self, uri: str, backoff: Backoff | None = None) -> None:
        """Open a URI.

        Args:
            uri: of a folder or prefix.
            backoff: how often a request is tried, and when.

        Raises:
            ConfigError: see `open_filesystem`.
        """
        self.uri = uri
        self.backoff = backoff
        self.filesystem, self.base = open_filesystem(uri, tries=1)

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """The filesystem, which tries again by itself, and the prefix."""
        return open_filesystem(self.uri)

    def place(self, path: str) -> str:
        """Its URI."""
        return join(self.uri, path)

    def write(self, path: str, data: pa.Buffer) -> None:
        """Upload; the object shows when the upload is complete."""
        try:
            self._retried("write", path, lambda: self._put(f"{self.base}/{path}", data))
        except FileNotFoundError as error:
            raise MachineError(f"cannot write {self.place(path)}: {error}") from None

    def read(self, path: str) -> pa.Buffer:
        """Download the object."""
        return self._retried("read", path, lambda: self._get(f"{self.base}/{path}"))

    def read_fixed(self, path: str, is_sound: Callable[[pa.Buffer], bool]) -> pa.Buffer:
        """Map the cache's copy, which is fetched where there is none."""
        cache = open_cache()
        if cache is None:
            return self.read(path)
        _, digest, kind = path.rsplit(".", 2)
        return cache.read(f"{digest}.{kind}", lambda: self.read(path), is_sound)

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        target = f"{self.base}/{path}"
        found = self._retried("read", path, lambda: self.filesystem.get_file_info(target))
        return bool(found.type == fs.FileType.File)

    def has_folder(self, folder: str) -> bool:
        """Whether there is an object below such a prefix."""
        target = f"{self.base}/{folder}".rstrip("/")
        found = self._retried("read", folder, lambda: self.filesystem.get_file_info(target))
        if found.type == fs.FileType.NotFound:
            self._listed(folder)  # a bucket that is not there says so here alone
        return bool(found.type == fs.FileType.Directory)

    def list(self, folder: str) -> list[str]:
        """List the objects below a prefix."""
        return sorted(self.versions(folder))

    def versions(self, folder: str) -> dict[str, str]:
        """Path -> size and time of change of every object below a prefix, of one listing."""
        start = len(self.base) + 1
        return {
            info.path[start:]: f"{info.size} {info.mtime_ns}"
            for info in self._listed(folder)
            if info.type == fs.FileType.File
        }

    def delete(self, path: str) -> None:
        """Remove the object if it is there."""
        with suppress(FileNotFoundError):
            self._retried(
                "delete", path, lambda: self.filesystem.delete_file(f"{self.base}/{path}")
            )

    def _listed(self, folder: str) -> Sequence[fs.FileInfo]:
        # `allow_not_found` would take a bucket that is not there for an empty one.
        selector = fs.FileSelector(f"{self.base}/{folder}", recursive=True)
        try:
            return self._retried("list", folder, lambda: self.filesystem.get_file_info(selector))
        except FileNotFoundError:
            return []

    def _retried(self, doing: str, path: str, action: Callable[[], T]) -> T:
        return retried(action, doing, self.place(path), self.backoff)

    def _put(self, target: str, data: pa.Buffer) -> None:
        try:
            self._put_whole(target, data)
        except FileNotFoundError:
            if self.filesystem.type_name in OBJECT_STORES:
                raise
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            self._put_whole(target, data)

    def _put_whole(self, target: str, data: pa.Buffer) -> None:
        if isinstance(self.filesystem, fs.PyFileSystem):
            # A stream of fsspec's would be completed by whatever ends it.
            self.filesystem.handler.fs.pipe_file(target, bytes(memoryview(data)))
            return
        # No `with`: it would complete an object that could not be written.
        stream = self.filesystem.open_output_stream(target)
        stream.write(data)
        stream.close()

    def _get(self, target: str) -> pa.Buffer:
        with self.filesystem.open_input_file(target) as file:
            data, size = file.read_buffer(), file.size()
        if data.size < size:
            raise ConnectionError(f"{target} ended after {data.size} of {size} bytes")
        return data
