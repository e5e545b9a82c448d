"""Where a store's bytes lie: a local folder, or any pyarrow filesystem URI.

Both write a file whole or not at all. A local file is written under a temporary name, synced and
renamed; an object store shows an object only when its upload is complete.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from pyarrow import fs

from dafm_ray.errors import ConfigError, DataError, refusals


class Storage(Protocol):
    """Files under one root, addressed by relative paths with `/`."""

    uri: str

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow filesystem and the root's path on it."""
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

    def list(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted; empty if there is no such folder."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file if it is there."""
        ...


def open_storage(uri: str) -> Storage:
    """Storage at a path or URI, as `runs/icons`, `file:///data/store` or `s3://bucket/store`."""
    if "://" not in uri or uri.startswith("file://"):
        return LocalStorage(uri.removeprefix("file://"))
    return RemoteStorage(uri)


class LocalStorage:
    """A folder on this machine or on a mounted disk."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).absolute()
        self.uri = str(self.root)

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """The local filesystem and the folder."""
        return fs.LocalFileSystem(), self.uri

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

    def list(self, folder: str) -> list[str]:
        """Walk the folder; temporary files are left out."""
        found: list[str] = []
        pending = [self.root / folder]
        while pending:
            with suppress(FileNotFoundError), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        pending.append(Path(entry.path))
                    elif not entry.name.endswith(".tmp"):
                        found.append(os.path.relpath(entry.path, self.root))
        return sorted(found)

    def delete(self, path: str) -> None:
        """Remove the file if it is there."""
        with suppress(FileNotFoundError):
            (self.root / path).unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStorage:
    """Any filesystem that `pyarrow.fs` knows by URI: S3, GCS, Azure, HDFS."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            self.filesystem, self.base = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"cannot open the storage URI {uri}: {error}") from None

    @property
    def location(self) -> tuple[fs.FileSystem, str]:
        """The filesystem and the prefix."""
        return self.filesystem, self.base

    def write(self, path: str, data: pa.Buffer) -> None:
        """Upload; the object shows when the upload is complete."""
        with (
            refusals(f"{self.uri}/{path}"),
            self.filesystem.open_output_stream(f"{self.base}/{path}") as stream,
        ):
            stream.write(data)

    def read(self, path: str) -> pa.Buffer:
        """Download the object."""
        with self.filesystem.open_input_file(f"{self.base}/{path}") as file:
            return file.read_buffer()

    def list(self, folder: str) -> list[str]:
        """List the objects below a prefix."""
        selector = fs.FileSelector(f"{self.base}/{folder}", recursive=True, allow_not_found=True)
        start = len(self.base) + 1
        try:
            infos = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise DataError(f"cannot list {self.uri}/{folder}: {error}") from None
        return sorted(info.path[start:] for info in infos if info.type == fs.FileType.File)

    def delete(self, path: str) -> None:
        """Remove the object if it is there."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.base}/{path}")
