import itertools
import threading

import pytest
from PIL import Image

from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.sources import AT_ONCE, Files, opened
from dafm_ray.errors import MachineError
from tests.samples import picture


def test_files_stay_inside_their_root(tmp_path):
    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "out.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    source = Files(str(tmp_path / "in"))
    for locator in ("../out.png", str(tmp_path / "out.png"), "link.png"):
        with pytest.raises(ImageError, match="leaves"):
            source.open(locator)
    with pytest.raises(ImageError, match="missing"):
        source.open("nothing.png")


class Remote:
    """Answers when `together` were asked for; `7` is broken, `99` a server that is away."""

    is_remote = True

    def __init__(self, together):
        self.all = threading.Barrier(together, timeout=10)
        self.together = together
        self.numbers = itertools.count(1)

    def open(self, locator):
        if next(self.numbers) <= self.together:
            self.all.wait()
        if locator == "7":
            raise ImageError("not an image")
        if locator == "99":
            raise MachineError("it does not answer")
        return Image.new("L", (int(locator) + 1, 1))


def test_of_a_remote_source_several_are_under_way_and_come_in_order():
    found = list(opened(Remote(2), [str(n) for n in range(40)]))
    assert found[7] == "not an image"
    assert [image.width for image in found[:7] + found[8:]] == [*range(1, 8), *range(9, 41)]


def test_a_server_that_is_away_ends_it_and_few_more_are_asked_for():
    source = Remote(1)
    with pytest.raises(MachineError, match="does not answer"):
        list(opened(source, ["99", *(str(n % 7) for n in range(99))]))
    assert next(source.numbers) - 1 <= 2 * AT_ONCE
