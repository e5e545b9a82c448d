import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.datasets.base import Dataset, Gallery, Query, digest
from dafm_ray.errors import DataError
from tests.samples import NoImages

ids = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30, unique=True)


def dataset(gallery: Gallery, *queries: Query) -> Dataset:
    return Dataset("d", "s", "cirr", "mask", gallery, queries, NoImages())


@given(ids, st.randoms())
def test_gallery_order_does_not_depend_on_the_source(names, random):
    shuffled = names.copy()
    random.shuffle(shuffled)
    first = Gallery.from_source({name: name for name in names})
    second = Gallery.from_source({name: name for name in shuffled})
    assert first.ids == second.ids
    assert first.digest == second.digest
    assert [shuffled[n] for n in second.source_order] == list(second.ids)


def test_hash_order_is_ascending_blake2b_of_the_id():
    gallery = Gallery.from_source({f"image-{n}": "" for n in range(50)})
    keys = [hashlib.blake2b(id.encode(), digest_size=16).digest() for id in gallery.ids]
    assert keys == sorted(keys)


@given(st.lists(st.text()), st.lists(st.text()))
def test_digest_tells_sequences_apart(one, other):
    assert (digest(one) == digest(other)) == (one == other)


def test_queries_that_share_a_reference_stand_together():
    gallery = Gallery.from_source({name: name for name in "abc"})
    queries = [Query(f"q{n}", "abc"[n % 3], ("x",), ("a",)) for n in range(9)]
    references = [q.reference for q in dataset(gallery, *queries).queries]
    assert sum(a != b for a, b in pairwise(references)) == 2


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query("q", "x", ("t",)), "'x', which is not in the gallery"),
        (Query("q", "a", ("t",), targets=("y",)), "'y', which is not in the gallery"),
        (Query("q", "a", ("t",), group=("z",)), "'z', which is not in the gallery"),
    ],
)
def test_a_query_that_names_an_unknown_image_is_refused(query, message):
    with pytest.raises(DataError, match=message):
        dataset(Gallery.from_source({"a": "a"}), query)


def test_duplicate_query_ids_are_refused():
    query = Query("q", "a", ("t",))
    with pytest.raises(DataError, match="'q' stands twice"):
        dataset(Gallery.from_source({"a": "a"}), query, query)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="0 queries"):
        dataset(Gallery.from_source({"a": "a"}))
