import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from dafm_ray import lease
from dafm_ray.errors import DataError, MachineError
from dafm_ray.lease import writing
from dafm_ray.storage import LocalStorage, RemoteStorage

HOLD = """
import sys, time
from dafm_ray.lease import writing
from dafm_ray.storage import LocalStorage
with writing(LocalStorage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_stops_and_a_killed_one_frees_the_store(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    with (
        pytest.raises(MachineError, match=f"another run is writing.*{holder.pid}"),
        writing(LocalStorage(str(tmp_path))),
    ):
        pass
    holder.kill()
    holder.wait()
    with writing(LocalStorage(str(tmp_path))):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A storage without locks, as an object store is: pyarrow's view of a local folder."""
    monkeypatch.setattr(lease, "EXPIRY", 4.0)
    return RemoteStorage(f"file://{tmp_path}")


def test_a_lease_without_locks_is_held_renewed_and_freed(remote):
    with writing(remote):
        time.sleep(4.5)
        with pytest.raises(MachineError, match="another run"), writing(remote):
            pass
    with writing(remote):
        pass


def test_an_expired_lease_is_free(remote):
    values = {"host": "gone", "pid": 1, "token": "x", "renewed": time.time() - 10}
    remote.write("lease.json", pa.py_buffer(json.dumps(values).encode()))
    with writing(remote):
        pass


def test_a_release_that_fails_does_not_hide_what_ended_the_run(remote, monkeypatch):
    def refused(path):
        raise MachineError("the storage is away")

    monkeypatch.setattr(remote, "delete", refused)
    with pytest.raises(DataError, match="what ended it"), writing(remote):
        raise DataError("what ended it")


def test_of_two_that_write_at_once_the_last_one_holds(remote, monkeypatch):
    honest = lease._write

    def overtaken(storage, token):
        honest(storage, token)
        honest(storage, "other")

    monkeypatch.setattr(lease, "_write", overtaken)
    with pytest.raises(MachineError, match="another run"), writing(remote):
        pass
