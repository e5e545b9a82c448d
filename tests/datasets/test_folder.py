import json

import pytest

from dafm_ray.errors import DataError
from tests.samples import image_folder, open_folder, picture


def write(root, *lines):
    root.mkdir(exist_ok=True)
    picture(0).save(root / "a.png")
    picture(1).save(root / "b.png")
    (root / "queries.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(root)


def test_a_folder_is_images_and_queries(tmp_path):
    dataset = open_folder(str(image_folder(tmp_path / "own", images=20, queries=9)))
    assert len(dataset.gallery) == 20
    assert len(dataset.queries) == 9
    assert all(query.excluded == (query.reference,) for query in dataset.queries)
    assert dataset.source.open("003.png").size == (40, 32)


def test_gallery_txt_names_the_gallery(tmp_path):
    root = image_folder(tmp_path / "own")
    (root / "gallery.txt").write_text("".join(f"{n:03d}.png\n" for n in range(16)))
    assert len(open_folder(str(root)).gallery) == 16


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "queries.jsonl:1 is not JSON"),
        ("[]", "must be a JSON object"),
        (json.dumps({"reference": "a.png"}), "'text' is missing or empty"),
        (json.dumps({"reference": 3, "text": "x"}), "'reference' must be"),
        (json.dumps({"refrence": "a.png", "text": "x"}), "unknown key 'refrence'"),
        (json.dumps({"reference": "a.png", "text": "x", "targets": [1]}), "list of strings"),
        (json.dumps({"reference": "a.png", "text": " "}), "'text' is missing or empty"),
        (json.dumps({"reference": "a.png", "text": "x", "target": "a.png"}), "is the reference"),
        (json.dumps({"reference": "a.png", "text": "x", "target": ""}), "a target is empty"),
        (json.dumps({"reference": "a.png", "text": "\ud800"}), "not Unicode text"),
        (json.dumps({"reference": "a.png", "text": "x", "group": ["b.png"] * 2}), "stands twice"),
        (json.dumps({"reference": "c.png", "text": "x"}), "not in the gallery"),
        (json.dumps({"reference": "a.png", "text": "x", "captions": ["y"]}), "say the same"),
        (
            json.dumps({"reference": "a.png", "text": "x", "target": "b.png", "targets": []}),
            "say the same",
        ),
        ('{"reference": "a.png", "text": "x", "text": "y"}', "the key 'text' stands twice"),
        (json.dumps({"id": True, "reference": "a.png", "text": "x"}), "'id' must be text"),
        (json.dumps({"category": ["a"], "reference": "a.png", "text": "x"}), "'category' must"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        open_folder(write(tmp_path / "own", line))


def test_separators_inside_a_text_byte_order_marks_and_missing_ids(tmp_path):
    line = json.dumps({"id": None, "reference": "a.png", "text": "a\u2028b"}, ensure_ascii=False)
    root = write(tmp_path / "own", line, line)
    file = tmp_path / "own" / "queries.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert sorted(query.id for query in open_folder(root).queries) == ["1", "2"]


def test_other_encodings_are_named(tmp_path):
    root = write(tmp_path / "own")
    (tmp_path / "own" / "queries.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        open_folder(root)


def test_a_missing_folder_and_missing_queries(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        open_folder(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no queries\.jsonl"):
        open_folder(str(tmp_path))


def test_an_image_listed_twice_is_refused(tmp_path):
    root = image_folder(tmp_path / "own")
    (root / "gallery.txt").write_text("000.png\n001.png\n000.png\n")
    with pytest.raises(DataError, match=r"'000\.png' stands twice"):
        open_folder(str(root))
