import json

import pytest

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.annotations import (
    annotations_below,
    read_json,
    read_queries,
    read_text,
    take,
    texts,
)
from dafm_ray.datasets.base import Query
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.storage import open_storage


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"[1, 2", list, "is not JSON"),
        (b"{}", list, "must hold a list"),
        (b"[]", dict, "must hold an object"),
        (b'{"a": 1, "a": 2}', dict, "the key 'a' stands twice"),
        (b"[\xff]", list, "is not UTF-8"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, content, kind, message):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read_json(open_storage(str(tmp_path)), "x.json", kind)
    assert str(file) in str(raised.value)


def test_a_missing_file_a_byte_order_mark_and_ends_of_lines(tmp_path):
    folder = open_storage(str(tmp_path))
    with pytest.raises(DataError, match="there is no file"):
        read_json(folder, "nothing.json", list)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(folder, "", list)
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(folder, "x.json", list) == [1]
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(folder, "x.txt") == "a\nb\nc\n"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "here must be an object"),
        ({}, "here: 'id' is missing"),
        ({"id": "7"}, "'id' must be a whole number, found '7'"),
        ({"id": True}, "'id' must be a whole number"),
    ],
)
def test_a_value_is_checked(entry, message):
    with pytest.raises(DataError, match=message):
        take(entry, "id", int, "here")


def test_texts_are_strings():
    assert texts(["a", ""], "captions", "here") == ("a", "")
    for wrong in ("a", [1], None):
        with pytest.raises(DataError, match="here: 'captions' must be a list of strings"):
            texts(wrong, "captions", "here")


def test_entries_that_cannot_be_understood_are_listed_and_the_rest_is_read():
    def build(entry, where):
        return Query(take(entry, "id", str, where), "r", (entry.get("text", ""),))

    entries = [{"id": "a"}, {}, {"id": "b", "text": json.loads('"\\ud800"')}, {"id": "c"}]
    queries, problems = read_queries(((f"entry {n}", e) for n, e in enumerate(entries)), build)
    assert [query.id for query in queries] == ["a", "c"]
    assert [problem.item for problem in problems] == ["entry 1", "entry 2"]
    assert "not Unicode" in problems[1].detail


def test_annotations_lie_in_the_root_or_below_it_or_where_it_is_said(tmp_path):
    (tmp_path / "cirr").mkdir()
    (tmp_path / "cirr" / "x.json").touch()
    root = str(tmp_path)
    for where in (root, f"file://{root}"):
        found = annotations_below(DatasetConfig("cirr", root=where), "cirr", "x.json")
        assert found.uri == str(tmp_path / "cirr")
    named = DatasetConfig("cirr", root="elsewhere", annotations=str(tmp_path / "cirr"))
    assert annotations_below(named, "cirr", "x.json").uri == str(tmp_path / "cirr")
    with pytest.raises(DataError, match=r"there is no y\.json in"):
        annotations_below(DatasetConfig("cirr", root=root), "cirr", "y.json")
    with pytest.raises(ConfigError, match=r"set dataset\.root"):
        annotations_below(DatasetConfig("cirr"), "cirr", "x.json")
