"""Values in transit between the stages of a Ray Data pipeline, each an Arrow table of one row.

The pixels of images lie outside of the pickle: a stage reads them where the object store holds
them, and passes them on untouched. As Python objects they would be copied several times a stage.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from dafm_ray.errors import DafmError

_PIXELS = pa.list_(pa.large_binary())


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Image.Image) or value.mode != "RGB":
            return NotImplemented
        return _image, (value.size, pickle.PickleBuffer(np.asarray(value).data))


def _image(size: tuple[int, int], pixels: pa.Buffer) -> Image.Image:
    return Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1)


def pack(value: object) -> pa.Table:
    """A table of one row that holds anything picklable."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append).dump(value)
    pixels = [buffer.raw() for buffer in buffers]
    return pa.table(
        {
            "value": pa.array([stream.getvalue()], pa.large_binary()),
            "pixels": pa.array([pixels], _PIXELS),
        }
    )


def unpack(table: pa.Table) -> Any:
    """What `pack` was given."""
    pixels = [pixels.as_buffer() for pixels in table["pixels"][0].values]
    return pickle.loads(table["value"][0].as_buffer(), buffers=pixels)


def staged(action: Callable[[Any], Any], table: pa.Table) -> pa.Table:
    """Run one stage; a `DafmError` travels on as the value, and later stages pass it by.

    Args:
        action: from the value to the next; a table is not packed anew for the same value.
        table: packed.
    """
    value = unpack(table)
    if isinstance(value, DafmError):
        return table
    try:
        result = action(value)
    except DafmError as error:
        result = error
    return table if result is value else pack(result)


def arrived(table: pa.Table) -> Any:
    """The value at the end of its stages.

    Raises:
        DafmError: the error that travelled in its place.
    """
    value = unpack(table)
    if isinstance(value, DafmError):
        raise value
    return value
