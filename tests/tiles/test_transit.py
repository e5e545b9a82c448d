import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dafm_ray.errors import DataError
from dafm_ray.tiles.transit import arrived, pack, staged, unpack


def picture(mode, size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK", "F"])
def test_an_image_arrives_as_it_was(mode):
    given = picture(mode, (37, 20))
    back = unpack(pack(("u", given)))[1]
    assert (back.mode, back.size) == (given.mode, given.size)
    np.testing.assert_array_equal(np.asarray(back.convert("RGB")), np.asarray(given.convert("RGB")))


def test_transparency_of_a_palette_arrives():
    given = picture("P", (5, 4))
    given.info["transparency"] = 3
    assert unpack(pack(given)).convert("RGBA").tobytes() == given.convert("RGBA").tobytes()


def test_pixels_lie_outside_of_the_pickle():
    table = pack([picture("RGB", (100, 100))] * 2)
    assert len(table["value"][0].as_py()) < 1000
    assert len(table["pixels"][0]) == 1  # one image twice is one


@given(st.lists(st.integers() | st.text() | st.none()))
def test_any_value_arrives(value):
    assert unpack(pack(value)) == value


def test_a_stage_passes_the_same_value_on_without_packing_it():
    table = pack("unit")
    assert staged(lambda unit: unit, table) is table
    assert unpack(staged(lambda unit: unit + "s", table)) == "units"


def test_an_error_travels_past_the_stages_that_follow():
    def fails(_):
        raise DataError("no numbers")

    table = staged(lambda _: pytest.fail("ran"), staged(fails, pack("unit")))
    assert isinstance(table, pa.Table)
    with pytest.raises(DataError, match="no numbers"):
        arrived(table)
    assert arrived(pack(7)) == 7
