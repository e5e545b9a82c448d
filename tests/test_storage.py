import errno
import os
import stat
import subprocess

import pyarrow as pa
import pytest

from dafm_ray.errors import ConfigError, MachineError, refusals
from dafm_ray.storage import LocalStorage, open_storage


def test_what_is_written_is_read_and_listed(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write("a/b.bin", pa.py_buffer(b"1"))
    storage.write("a/b.bin", pa.py_buffer(b"22"))
    storage.write("a/c/d.bin", pa.py_buffer(b""))
    assert bytes(memoryview(storage.read("a/b.bin"))) == b"22"
    assert storage.read("a/c/d.bin").size == 0
    assert storage.list("a") == ["a/b.bin", "a/c/d.bin"]
    assert storage.list("nowhere") == []
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    assert storage.list("") == ["a/c/d.bin"]


def test_a_read_maps_the_file(tmp_path):
    storage = LocalStorage(str(tmp_path))
    storage.write("x", pa.py_buffer(b"0" * 10_000_000))
    before = pa.total_allocated_bytes()
    data = storage.read("x")
    assert pa.total_allocated_bytes() == before
    assert data.size == 10_000_000


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    storage = LocalStorage(str(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="disk is full"):
        storage.write("a", pa.py_buffer(b"1"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        storage = LocalStorage(str(tmp_path))
        storage.write("small", pa.py_buffer(b"1"))
        with pytest.raises(MachineError, match="disk is full"):
            storage.write("large", pa.py_buffer(b"0" * 2_000_000))
        assert [path.name for path in tmp_path.iterdir()] == ["small"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_half_a_file_of_a_dead_process_is_not_listed(tmp_path):
    storage = LocalStorage(str(tmp_path))
    (tmp_path / ".a.123.tmp").write_bytes(b"half")
    assert storage.list("") == []


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")],
)
def test_refusals_say_what_to_do(number, message):
    with pytest.raises(MachineError, match=message), refusals("/store"):
        raise OSError(number, os.strerror(number))


def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    user = os.geteuid()
    if user == 0:  # root may write everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(MachineError, match="permission denied"):
            LocalStorage(str(tmp_path)).write("a", pa.py_buffer(b"1"))
    finally:
        os.seteuid(user)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="cannot open the storage URI"):
        open_storage("ftp2://somewhere/store")


def test_links_are_listed_and_not_followed(tmp_path):
    """A link may lead outside, in a circle, or nowhere; what is asked for may be a link itself."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "a", outside):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    (inside / "circle").symlink_to(inside)
    (inside / "away").symlink_to(outside)
    (inside / "broken").symlink_to(tmp_path / "nowhere")
    (inside / "itself").symlink_to(inside / "itself")
    (inside / "file").symlink_to(outside / "x")
    os.mkfifo(inside / "pipe")
    storage = LocalStorage(str(inside))
    assert storage.list("") == ["a/x", "away", "broken", "circle", "file", "itself"]
    assert storage.list("away") == ["away/x"]
    assert storage.list("a/x") == []


def test_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "x").touch()
    storage = LocalStorage(str(tmp_path))
    assert [storage.has_folder(path) for path in ("", "a", "x", "b")] == [True, True, False, False]
