"""Progress of long work: a bar with rate and ETA on a terminal, `status.json` for machines."""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import pyarrow as pa
from tqdm import tqdm

from dafm_ray.errors import MachineError
from dafm_ray.storage import Storage

StatusWriter = Callable[[bytes], None]

STATUS = "status.json"
_INTERVAL_S = 1.0


@dataclass
class Status:
    """What `status.json` says; `rate` in items a second, `waiting` why nothing goes on."""

    stage: str
    done: int
    total: int
    rate: float = 0.0
    failures: int = 0
    waiting: str = ""


class Progress:
    """Counts the items of one stage."""

    def __init__(self, status: Status, unit: str, write_status: StatusWriter | None) -> None:
        self._status = status
        self._write_status = write_status
        self._one_writer = threading.Lock()
        self._already_done = status.done
        self._started = self._written = time.monotonic()
        self._bar = tqdm(
            desc=status.stage, total=status.total, initial=status.done, unit=unit, disable=None
        )
        self._write()

    def advance(self, items: int = 1, failures: int = 0) -> None:
        """Count finished and failed items."""
        now = time.monotonic()
        self._status.waiting = ""
        self._status.done += items
        self._status.failures += failures
        self._status.rate = (self._status.done - self._already_done) / max(
            now - self._started, 1e-9
        )
        self._bar.update(items)
        if now - self._written >= _INTERVAL_S:
            self._written = now
            self._write()

    @property
    def done(self) -> int:
        """Finished items."""
        return self._status.done

    def wait(self, reason: str) -> None:
        """Say why nothing goes on, until an item is finished."""
        if reason != self._status.waiting:
            self._status.waiting = reason
            self._write()
            tqdm.write(f"waiting: {reason}", file=sys.stderr)

    def close(self) -> None:
        """End the bar and write the last status."""
        self._bar.close()
        self._write()

    def _write(self) -> None:
        if self._write_status is None:
            return
        with self._one_writer:
            self._write_status((json.dumps(asdict(self._status)) + "\n").encode())


@contextmanager
def progress(
    stage: str,
    total: int,
    done: int = 0,
    unit: str = "item",
    write_status: StatusWriter | None = None,
) -> Iterator[Progress]:
    """Show the progress of a stage.

    Args:
        stage: its name.
        total: items in all.
        done: items an earlier run has finished.
        unit: what an item is.
        write_status: stores the bytes of `status.json`; called at most once a second.
    """
    shown = Progress(Status(stage, done, total), unit, write_status)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def followed(stage: str, total: int, read: Callable[[], bytes], unit: str) -> Iterator[None]:
    """Show the progress that another process writes to a `status.json`, which `read` reads."""
    finished = threading.Event()

    def follow() -> None:
        done = 0
        with progress(stage, total, unit=unit) as shown:
            while True:
                last = finished.wait(_INTERVAL_S)
                with suppress(OSError, ValueError, KeyError, MachineError):
                    now = int(json.loads(read())["done"])
                    shown.advance(now - done)
                    done = now
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def status_writer(*storages: Storage) -> StatusWriter:
    """What stores the bytes of a `status.json`: in the folders of stores or results."""

    def write(data: bytes) -> None:
        for storage in storages:
            storage.write(STATUS, pa.py_buffer(data))

    return write


def status_line(stage: str, done: int, total: int) -> bytes:
    """The bytes of a `status.json`."""
    return (json.dumps(asdict(Status(stage, done, total))) + "\n").encode()
