import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dafm_ray.datasets.base import Query
from dafm_ray.tiles import blocks

text = st.text(max_size=6)
texts = st.lists(text, max_size=3).map(tuple)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@given(data=st.data())
def test_arrays_survive(dtype, data):
    shape = data.draw(array_shapes(min_dims=2, max_dims=3, max_side=6))
    values = data.draw(arrays(dtype, shape))
    read = blocks.decode_array(blocks.encode_array(values))
    assert read.dtype == values.dtype
    assert np.array_equal(read, values, equal_nan=True)


def test_reading_copies_nothing():
    encoded = blocks.encode_array(np.ones((100, 1000), dtype=np.float32))
    before = pa.total_allocated_bytes()
    read = blocks.decode_array(encoded)
    assert pa.total_allocated_bytes() == before
    assert not read.flags.owndata
    assert not read.flags.writeable


def test_plain_arrow_reads_a_tile(tmp_path):
    (tmp_path / "tile.arrow").write_bytes(
        blocks.encode_array(np.arange(6, dtype=np.float32).reshape(2, 3))
    )
    with pa.memory_map(str(tmp_path / "tile.arrow")) as file:
        column = pa.ipc.open_file(file).read_all()["values"].combine_chunks()
    assert column.to_numpy_ndarray().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_one_flipped_bit_changes_the_checksum():
    data = bytearray(blocks.encode_array(np.ones((3, 3), dtype=np.float32)))
    honest = blocks.checksum(pa.py_buffer(bytes(data)))
    for position in range(0, len(data), 7):
        data[position] ^= 1
        assert blocks.checksum(pa.py_buffer(bytes(data))) != honest
        data[position] ^= 1


@given(st.lists(st.builds(Query, text, text, texts, texts, texts, texts, text, text), max_size=4))
def test_queries_survive(queries):
    assert blocks.decode_queries(blocks.encode_queries(queries)) == tuple(queries)


def test_a_gallery_survives():
    read = blocks.decode_gallery(blocks.encode_gallery(["ä", "b"], [1, 0]))
    assert read == (("ä", "b"), (1, 0))
