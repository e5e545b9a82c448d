from collections import Counter

import numpy as np
import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.icons import _code_points, _draw, _modifiers
from dafm_ray.datasets.images import ImageError
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import ConfigError

GALLERY = {"train": 4204, "val": 1382, "test": 1710}
QUERIES = {"train": 6919, "val": 1673, "test": 2324}
ADDS = {"train": 2210, "val": 559, "test": 792}


@pytest.fixture(scope="module", params=["train", "val", "test"])
def icons(request):
    return load_dataset(DatasetConfig("icons", request.param))


def test_counts_of_the_protocol(icons):
    kinds = Counter(query.category for query in icons.queries)
    assert len(icons.gallery) == GALLERY[icons.split]
    assert len(icons.queries) == QUERIES[icons.split]
    assert kinds["add"] == kinds["remove"] == ADDS[icons.split]


def test_counts_of_the_font():
    assert len(_code_points()) == 7296
    assert len({_draw(name).tobytes() for name in _code_points()}) == 7272
    assert len(_modifiers()) == 84


def test_reference_and_its_pixel_twins_are_masked_and_twins_of_the_target_count(icons):
    pixels = {name: _draw(name).tobytes() for name in icons.gallery.ids}
    for query in icons.queries[::37]:
        assert {pixels[id] for id in query.excluded} == {pixels[query.reference]}
        assert {pixels[id] for id in query.targets} == {pixels[query.targets[0]]}
        assert not set(query.excluded) & set(query.targets)
        same = [id for id in icons.gallery.ids if pixels[id] == pixels[query.reference]]
        assert sorted(same) == sorted(query.excluded)


def test_groups_hold_reference_and_target_and_at_most_six(icons):
    for query in icons.queries:
        assert 2 <= len(query.group) <= 6
        assert query.reference in query.group
        assert query.targets[0] in query.group


def test_texts_say_the_edit_in_words():
    texts = {
        query.id: query.captions[0]
        for query in load_dataset(DatasetConfig("icons", "test")).queries
    }
    assert all(text and "_" not in text and "{" not in text for text in texts.values())


def test_a_glyph_is_black_on_white_and_centred():
    drawn = np.asarray(load_dataset(DatasetConfig("icons", "val")).source.open("home"))
    rows, columns = np.nonzero(drawn < 128)
    assert drawn.shape == (64, 64)
    assert drawn[0, 0] == 255
    assert abs(columns.min() + columns.max() - 63) <= 2
    assert rows.size > 100


def test_unknown_split_and_glyph():
    with pytest.raises(ConfigError, match="no split of icons 'dev'"):
        load_dataset(DatasetConfig("icons", "dev"))
    with pytest.raises(ImageError, match="no glyph"):
        load_dataset(DatasetConfig("icons", "val")).source.open("no_such_glyph")
