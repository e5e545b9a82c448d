import io

import numpy as np
import pytest
from PIL import Image

from dafm_ray.datasets import images
from dafm_ray.datasets.images import ImageError, decode, oddities
from tests.samples import picture


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_the_stored_colour_mode_is_kept(mode):
    image = picture(0).convert(mode)
    assert decode(encoded(image, "tiff" if mode == "CMYK" else "png")).mode == mode


def test_sixteen_bits_become_eight():
    wide = Image.fromarray(np.array([[0, 65535], [256, 32768]], dtype=np.uint16))
    assert np.asarray(decode(encoded(wide))).tolist() == [[0, 255], [1, 128]]


def test_modes_that_published_preprocessing_does_not_know_become_rgb():
    assert decode(encoded(Image.new("LAB", (4, 4)), "tiff")).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "kind", "says"),
    [
        (picture(0).convert("CMYK"), "jpeg", ["CMYK"]),
        (picture(0).convert("P"), "png", ["palette"]),
        (picture(0).convert("RGBA"), "png", ["transparency"]),
        (Image.fromarray(np.ones((4, 4), dtype=np.uint16)), "png", ["16 bits"]),
        (picture(0), "jpeg", []),
    ],
)
def test_what_decoding_changes_is_said(image, kind, says):
    found = [text.partition(":")[0] for text in oddities(encoded(image, kind))]
    assert [text for text in found if not any(text.startswith(word) for word in says)] == []
    assert len(found) == len(says)


def test_an_animation_and_a_rotation_are_said():
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert any("frames: the first is used" in text for text in oddities(data))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert oddities(encoded(picture(0), "jpeg", exif=exif)) == ("EXIF orientation 6: applied",)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    data = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(data).convert("L")).max() < 20


def test_exif_orientation_is_applied():
    image = picture(0, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, "jpeg", exif=exif)).size == (20, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>not found</body></html>", "not an image"),
        (encoded(picture(0, (200, 200)), "jpeg")[:2000], "cannot be decoded"),
        (encoded(picture(0, (200, 200)))[:2000], "cannot be decoded"),
    ],
)
def test_unusable_files_say_why(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_whatever_a_plugin_raises_is_a_reason(monkeypatch):
    def broken(image):
        raise TypeError("required argument is not an integer")

    monkeypatch.setattr(images.ImageOps, "exif_transpose", broken)
    with pytest.raises(ImageError, match="cannot be decoded: required argument"):
        decode(encoded(picture(0)))


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="more than 100 allowed"):
        decode(encoded(picture(0)))
