import pickle

import pyarrow as pa
import pytest
from pyarrow import fs

from dafm_ray.errors import ConfigError, MachineError
from dafm_ray.remote import Backoff, PatientS3, may_pass, open_filesystem, retried
from dafm_ray.storage import RemoteStorage, open_storage, results
from tests.object_store import every


class Waits(list[float]):
    """What a backoff would have slept."""

    def backoff(self, chance: float = 0.0) -> Backoff:
        return Backoff(sleep=self.append, chance=lambda: chance)


@pytest.fixture
def waits():
    return Waits()


@pytest.mark.parametrize("scheme", ["memory:/", "local://{}"])
def test_what_pyarrow_does_not_know_is_opened_by_fsspec(scheme, tmp_path):
    storage = open_storage(f"{scheme.format(tmp_path)}/store")
    storage.write("a/b.bin", pa.py_buffer(b"1"))
    storage.write("a/b.bin", pa.py_buffer(b"22"))
    assert storage.read("a/b.bin").to_pybytes() == b"22"
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")
    assert storage.list("a") == ["a/b.bin"]
    assert storage.list("nowhere") == []
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert storage.list("") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")
    filesystem, path = storage.location
    assert pickle.loads(pickle.dumps(filesystem)).get_file_info(f"{path}/x").type == 0


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp2://a/b", "neither pyarrow nor fsspec knows the scheme 'ftp2'"),
        ("gdrive://a/b", "needs a package that is not installed"),
        ("s3://key:secret@bucket/b?nonsense=1", r"URI s3://bucket/b\?nonsense=1: Unexpected query"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_one_clear_error(uri, message):
    with pytest.raises(ConfigError, match=message):
        open_filesystem(uri)


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_what_may_pass_is_tried_again(object_store, waits, fault):
    storage = RemoteStorage(object_store.uri("x"), waits.backoff())
    storage.write("a", pa.py_buffer(b"0" * 1000))
    object_store.fault = every(3, fault)
    for _ in range(2):
        assert storage.read("a").size == 1000  # asks for its size, then for its bytes
    storage.write("a", pa.py_buffer(b"1" * 1000))
    assert storage.list("") == ["a"]
    object_store.fault = lambda method, path: None
    assert storage.read("a").to_pybytes() == b"1" * 1000
    assert len(waits) == object_store.faults > 0


def test_waits_grow_by_chance_and_end_in_one_clear_error(object_store, waits):
    storage = RemoteStorage(object_store.uri("x"), waits.backoff(chance=0.5))
    object_store.fault = every(1, 503)
    with pytest.raises(MachineError, match=r"cannot read s3://stores/x/a\?.* failed 7 times"):
        storage.read("a")
    assert waits == [0.375, 0.75, 1.5, 3.0, 6.0, 6.0]
    assert object_store.faults == 7  # pyarrow tries nothing again on top of that


@pytest.mark.parametrize("act", ["read", "write", "list", "delete", "exists"])
def test_what_will_not_pass_is_said_at_once(object_store, waits, act):
    storage = RemoteStorage(object_store.uri("x"), waits.backoff())
    object_store.fault = every(1, 403)
    arguments = ("a", pa.py_buffer(b"1")) if act == "write" else ("a",)
    with pytest.raises(MachineError, match="access denied; check the credentials") as raised:
        getattr(storage, act)(*arguments)
    assert "testing:testing" not in str(raised.value)
    assert not waits


def test_a_bucket_that_is_not_there_is_said_at_once(object_store, waits):
    storage = RemoteStorage(object_store.uri("x", bucket="nowhere"), waits.backoff())
    with pytest.raises(MachineError, match="there is no such bucket"):
        storage.write("a", pa.py_buffer(b"1"))
    with pytest.raises(FileNotFoundError):
        storage.read("a")
    assert not waits


def test_a_server_that_is_gone_is_one_clear_error(object_store, waits):
    storage = RemoteStorage(object_store.uri("x"), waits.backoff())
    object_store.stop()
    with pytest.raises(MachineError, match="failed 7 times"):
        storage.read("a")
    assert len(waits) == 6


def test_an_object_in_parts_is_whole_or_not_there(object_store, waits):
    """An upload of three parts, of which one is refused again and again."""
    storage = RemoteStorage(object_store.uri("x"), waits.backoff())
    data = pa.py_buffer(bytes(25_000_000))
    uploads = iter(range(1000))

    def second_part(method, path):
        return 500 if method == "PUT" and next(uploads) % 3 == 1 else None

    object_store.fault = second_part
    with pytest.raises(MachineError, match="failed 7 times"):
        storage.write("big", data)
    assert not storage.exists("big")
    object_store.fault = lambda method, path: None
    storage.write("big", data)
    assert storage.read("big").size == data.size


def test_s3_is_patient_in_other_processes_too(object_store):
    filesystem, path = pickle.loads(pickle.dumps(open_filesystem(object_store.uri("x"), tries=3)))
    assert isinstance(filesystem, PatientS3)
    object_store.fault = every(1, 500)
    with pytest.raises(OSError, match="500"):
        filesystem.get_file_info(path)
    assert object_store.faults == 3


def test_which_errors_may_pass():
    class AnswerError(Exception):
        status = 503

    assert all(map(may_pass, (TimeoutError(), ConnectionResetError(), AnswerError())))
    assert may_pass(OSError("google::cloud::Status(UNAVAILABLE: try later)"))
    assert not any(map(may_pass, (OSError("disk full"), ValueError("503"), KeyError("a"))))


def test_a_bug_is_not_hidden(waits):
    with pytest.raises(ZeroDivisionError):
        retried(lambda: 1 // 0, "read", "s3://bucket/a", waits.backoff())
    assert not waits


def test_results_are_uploaded_whole_with_their_mark_at_the_end(object_store):
    uri = object_store.uri("results")
    with results(uri, "report.html") as folder:
        for name in ("report.html", "z.csv", "figures/a.svg"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)
    puts = [path for method, path in object_store.requests if method == "PUT"]
    assert [path.partition("/results/")[2] for path in puts[-3:]] == [
        "figures/a.svg",
        "z.csv",
        "report.html",
    ]
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), results(object_store.uri("none"), "a") as folder:
        (folder / "a").write_text(f"half {1 // 0}")
    assert open_storage(object_store.uri("none")).list("") == []


def test_a_local_filesystem_of_pyarrow_has_no_patience():
    assert isinstance(open_filesystem("file:///tmp")[0], fs.LocalFileSystem)
