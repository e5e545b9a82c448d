"""One writer at a time on a store.

On a local disk the lease is a lock that the kernel drops when its holder dies. An object store has
no such lock: there the holder renews a small object, and a lease not renewed for `EXPIRY` seconds
is free. Without a conditional write two runs that start in the same second may both go on until
one of them renews; they write the same blocks, so nothing is lost but time.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa

from dafm_ray.errors import MachineError, refusals
from dafm_ray.storage import LocalStorage, Storage
from dafm_ray.uris import shown

LEASE = "lease.json"
EXPIRY = 60.0
"""Seconds after which a lease on an object store that nobody renews is free."""


@contextmanager
def writing(storage: Storage) -> Iterator[None]:
    """Hold the store's lease.

    Raises:
        MachineError: another process holds it; says which.
    """
    held = _locked(storage) if isinstance(storage, LocalStorage) else _renewed(storage)
    with held:
        yield


def _holder() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _taken(storage: Storage, holder: str) -> MachineError:
    return MachineError(
        f"another run is writing {shown(storage.uri)} ({holder}); wait for it or stop it, "
        "then start again: finished work is kept"
    )


@contextmanager
def _locked(storage: LocalStorage) -> Iterator[None]:
    path = storage.root / LEASE
    with refusals(path):
        storage.root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(storage, file.read().strip() or "holder unknown") from None
        file.truncate(0)
        file.write(json.dumps(_holder()))
        file.flush()
        yield


@contextmanager
def _renewed(storage: Storage) -> Iterator[None]:
    token = uuid.uuid4().hex
    holder = _read(storage)
    if holder and time.time() - float(str(holder["renewed"])) < EXPIRY:
        raise _taken(storage, json.dumps(holder))
    _write(storage, token)
    # Whoever wrote last holds it: of two that wrote at once, the other one finds a foreign token.
    time.sleep(1.0)
    holder = _read(storage)
    if not holder or holder["token"] != token:
        raise _taken(storage, json.dumps(holder))
    done = threading.Event()

    lost = threading.Event()

    def renew() -> None:
        while not done.wait(EXPIRY / 4):
            with suppress(OSError, MachineError):
                found = _read(storage)
                if found and found["token"] != token:
                    lost.set()
                    return
                _write(storage, token)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if not lost.is_set():
            with suppress(MachineError):  # it expires; what ended the run is what to say
                storage.delete(LEASE)
    if lost.is_set():
        raise _taken(storage, "it took the lease over")


def _read(storage: Storage) -> dict[str, object] | None:
    try:
        values: dict[str, object] = json.loads(bytes(memoryview(storage.read(LEASE))))
    except (FileNotFoundError, ValueError):
        return None
    return values if {"token", "renewed"} <= values.keys() else None


def _write(storage: Storage, token: str) -> None:
    values = {**_holder(), "token": token, "renewed": time.time()}
    storage.write(LEASE, pa.py_buffer(json.dumps(values).encode()))
