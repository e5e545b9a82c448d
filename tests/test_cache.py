import multiprocessing
import os
import random
import time
from pathlib import Path

import pyarrow as pa
import pytest

from dafm_ray import cache as module
from dafm_ray.cache import Cache, local_copy, open_cache
from dafm_ray.errors import ConfigError


class Source:
    """Files called by a letter, and how often each was fetched."""

    def __init__(self, cache):
        self.cache = cache
        self.fetched = []

    def read(self, name, size=100):
        def download():
            self.fetched.append(name)
            return pa.py_buffer(name.encode() * size)

        return self.cache.read(
            f"{name * 4}.arrow", download, lambda data: data.to_pybytes() == name.encode() * size
        )

    def kept(self):
        return {path.name[0] for path in self.cache.folder.glob("??/*")}


@pytest.fixture
def source(tmp_path):
    return Source(Cache(tmp_path / "cache", limit=1000))


def age(source, name, seconds):
    path = source.cache.path(f"{name * 4}.arrow")
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_file_is_fetched_once_and_mapped(tmp_path):
    source = Source(Cache(tmp_path, limit=100_000_000))
    source.read("a", 5_000_000)
    before = pa.total_allocated_bytes()
    assert source.read("a", 5_000_000).size == 5_000_000
    assert pa.total_allocated_bytes() == before
    assert source.fetched == ["a"]


def test_the_least_recently_used_files_go(source):
    for name in "abcdefghi":
        source.read(name)
        age(source, name, 100 - ord(name) % 32)
    source.read("a")  # used now, although it came first
    for name in "xyz":
        source.read(name)
    kept = source.kept()
    assert {"a", "x", "y", "z"} <= kept
    assert "b" not in kept
    assert len(kept) * 100 <= 1000


def test_a_removed_file_stays_readable_where_it_is_mapped(source):
    mapped = source.read("a")
    mapped = source.read("a")
    for name in "bcdefghijklmnop":
        source.read(name)
    source.cache.path("aaaa.arrow").unlink(missing_ok=True)
    assert mapped.to_pybytes() == b"a" * 100
    assert source.read("a").to_pybytes() == b"a" * 100


def test_a_damaged_copy_is_fetched_anew(source):
    source.read("a")
    source.cache.path("aaaa.arrow").write_bytes(b"x" * 100)
    later = Source(Cache(source.cache.folder, 1000))  # another process opens it first
    assert later.read("a").to_pybytes() == b"a" * 100
    assert later.fetched == ["a"]
    assert source.cache.path("aaaa.arrow").read_bytes() == b"a" * 100


def test_a_damaged_source_is_not_kept(source):
    data = source.cache.read("bad.arrow", lambda: pa.py_buffer(b"bad"), lambda data: False)
    assert data.to_pybytes() == b"bad"
    assert source.kept() == set()


def test_what_is_larger_than_the_limit_is_not_kept(source):
    assert source.read("a", 1001).size == 1001
    assert source.kept() == set()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    source = Source(Cache(tmp_path / "file" / "cache", 1000))
    assert source.read("a").to_pybytes() == source.read("a").to_pybytes() == b"a" * 100
    assert source.fetched == ["a", "a"]


def test_abandoned_files_are_cleared_away(source):
    source.read("a")
    old = source.cache.path("aa-old.tmp")
    old.parent.mkdir(exist_ok=True)
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    for name in "bcdefghijk":
        source.read(name)
    assert not old.exists()


def hammer(folder, seed):
    source = Source(Cache(Path(folder), 1000))
    draw = random.Random(seed)
    for _ in range(300):
        name = draw.choice("abcdefghijklmnopqrst")
        if source.read(name).to_pybytes() != name.encode() * 100:
            os._exit(1)


def test_processes_share_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=hammer, args=(str(tmp_path), n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    files = list(tmp_path.glob("??/*"))
    assert not [file for file in files if file.suffix == ".tmp"]
    assert sum(file.stat().st_size for file in files) <= 1000


def test_the_environment_says_where_and_how_much(monkeypatch, tmp_path):
    monkeypatch.setenv("DAFM_CACHE", str(tmp_path))
    monkeypatch.setenv("DAFM_CACHE_GB", "0.5")
    cache = open_cache()
    assert (cache.folder, cache.limit) == (tmp_path, 500_000_000)
    monkeypatch.setenv("DAFM_CACHE_GB", "0")
    assert open_cache() is None
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv("DAFM_CACHE_GB", text)
        with pytest.raises(ConfigError, match="DAFM_CACHE_GB"):
            open_cache()
    monkeypatch.delenv("DAFM_CACHE_GB")
    monkeypatch.delenv("DAFM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = open_cache()
    assert (cache.folder, cache.limit) == (tmp_path / "dafm_ray", 20_000_000_000)


@pytest.mark.parametrize("gigabytes", ["1", "0"])
def test_a_local_copy_follows_its_file(tmp_path, monkeypatch, gigabytes):
    monkeypatch.setenv("DAFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DAFM_CACHE_GB", gigabytes)
    file, uri = tmp_path / "weights.pt", f"local://{tmp_path}/weights.pt"
    file.write_bytes(b"1" * 40_000_000)  # in three parts
    copy = local_copy(uri)
    assert copy.suffix == ".pt"
    assert copy.read_bytes() == file.read_bytes()
    assert local_copy(uri) == copy
    copy.write_bytes(b"x")
    module._verified.clear()
    assert local_copy(uri).read_bytes() == file.read_bytes()
    file.write_bytes(b"2" * 10)
    assert local_copy(uri).read_bytes() == b"2" * 10
    with pytest.raises(FileNotFoundError):
        local_copy(f"local://{tmp_path}/none.pt")
