import pyarrow as pa
import pytest

from dafm_ray.errors import DataError
from dafm_ray.tiles.manifest import Grid, Manifest, ModelEntry

MANIFEST = Manifest(
    dataset={"name": "icons", "split": "val", "root": ""},
    protocol="cirr",
    policy="mask",
    gallery_size=3,
    gallery_digest="g",
    queries_size=2,
    queries_digest="q",
    score_type="float32",
    grid=Grid(64, 512, 32768),
    tables={"gallery.arrow": "x"},
    models={"a": ModelEntry("clip4cir:sum@random", "random")},
    versions={"torch": "2"},
)


def test_survives():
    assert Manifest.from_bytes(MANIFEST.to_bytes(), "here") == MANIFEST


def test_every_flipped_bit_is_found():
    data = bytearray(MANIFEST.to_bytes())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(DataError, match="here"):
                Manifest.from_bytes(pa.py_buffer(bytes(data)), "here")
            data[position] ^= 1 << bit


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"<html>"])
def test_other_files_are_refused(data):
    with pytest.raises(DataError, match="not a store manifest"):
        Manifest.from_bytes(pa.py_buffer(data), "here")
