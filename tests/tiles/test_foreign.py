import gzip
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dafm_ray.errors import DataError
from dafm_ray.tiles.foreign import read_systems

SCORES = np.arange(6, dtype=np.float16).reshape(2, 3)


def server_file(**changes):
    lists = {"7": ["c", "a"], "8": ["b"]}
    return json.dumps({"version": "rc2", "metric": "recall", **lists, **changes})


def damaged_gzip() -> bytes:
    data = bytearray(gzip.compress(server_file().encode() * 50))
    data[len(data) // 2] ^= 255
    return bytes(data)


def test_matrices_of_every_kind_are_the_same(tmp_path):
    np.save(tmp_path / "a.npy", SCORES)
    np.savez(tmp_path / "b.npz", scores=SCORES)
    save_file({"scores": SCORES}, tmp_path / "c.safetensors")
    systems, notes = read_systems(tmp_path)
    assert list(systems) == ["a", "b", "c"]
    assert notes == []
    for scores, _ in systems.values():
        assert (scores.dtype, scores.shape(), scores.query_ids) == ("float16", (2, 3), None)
        assert np.array_equal(scores.rows([1, 0]), SCORES[::-1])


@pytest.mark.parametrize("packed", [False, True])
def test_a_server_file_gives_reciprocal_ranks_and_leaves_the_rest_missing(tmp_path, packed):
    text = server_file().encode()
    name, data = ("a.json.gz", gzip.compress(text)) if packed else ("a.json", text)
    (tmp_path / name).write_bytes(data)
    scores, _ = read_systems(tmp_path)[0]["a"]
    assert scores.shape() is None
    rows = dict(zip(scores.gallery_ids, scores.rows([0, 1]).T.tolist(), strict=True))
    assert rows["c"][0] == 1.0
    assert rows["a"][0] == 0.5
    assert np.isnan(rows["b"][0])
    assert rows["b"][1] == 1.0


def test_a_trec_run_keeps_its_scores(tmp_path):
    (tmp_path / "a.run").write_text("7 Q0 c 1 2.5 tag\n\n7 Q0 a 2 -1e-3 tag\n8 Q0 b 1 3 tag\n")
    scores, _ = read_systems(tmp_path)[0]["a"]
    assert scores.query_ids == ("7", "8")
    assert scores.rows([0])[0, :2].tolist() == [2.5, np.float32(-1e-3)]


def test_scores_that_float32_cannot_tell_apart_are_said(tmp_path):
    (tmp_path / "a.trec").write_text("7 Q0 c 1 0.5 t\n7 Q0 a 2 0.500000000001 t\n8 Q0 b 1 3 t\n")
    assert read_systems(tmp_path)[1] == ["a.trec: 1 queries have scores that only tie as float32"]


def test_other_files_are_left_alone_and_subset_lists_are_said(tmp_path):
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "expected.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "s.json").write_text(server_file(metric="recall_subset"))
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "y.json").write_text("[" * 100_000)
    (tmp_path / "._a.npy").write_bytes(b"of another system")
    systems, notes = read_systems(tmp_path)
    assert systems == {}
    assert len(notes) == 3
    assert "s.json is left out: metric 'recall_subset'" in notes[0]
    assert "x.json is left out: it is not JSON" in notes[1]


def test_byte_order_and_byte_order_marks_do_not_matter(tmp_path):
    np.save(tmp_path / "a.npy", SCORES.astype(">f4"))
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + server_file().encode())
    systems, _ = read_systems(tmp_path)
    assert systems["a"][0].dtype == "float32"
    assert np.array_equal(systems["a"][0].rows([1]), SCORES[1:])
    assert "b" in systems


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.npy", lambda f: f.write_bytes(b"no array"), "is not an array"),
        ("a.npy", lambda f: f.write_bytes(b""), "is not an array"),
        ("a.npy", lambda f: np.save(f, np.array([{"a": 1}], dtype=object)), "is not an array"),
        ("a.npy", lambda f: np.save(f, SCORES[0]), r"has the shape \(3,\)"),
        ("a.npy", lambda f: np.save(f, SCORES.astype(float)), "holds float64; save it as float32"),
        ("a.npy", lambda f: np.save(f, SCORES.astype(int)), "holds int64"),
        ("a.npz", lambda f: np.savez(f, x=SCORES, y=SCORES), "must hold one array; found x, y"),
        ("a.npz", lambda f: f.write_bytes(b"PK nothing"), "is not an archive"),
        ("a.safetensors", lambda f: f.write_bytes(b"x" * 50), "is not a safetensors file"),
        ("a.run", lambda f: f.write_text("7 Q0 c"), "a.run:1 is not `query"),
        ("a.run", lambda f: f.write_text("7 Q0 c 1 high t"), "a.run:1 is not `query"),
        ("a.run", lambda f: f.write_text("7 Q0 c 1 2 t\n7 Q0 c 2 1 t"), "'c' stands twice"),
        ("a.run", lambda f: f.write_text("7 Q0 c 1 1e39 t"), "1e39 is not a float32"),
        ("a.json", lambda f: f.write_text(server_file(**{"7": "c"})), "'7' must have a list"),
        (
            "a.json",
            lambda f: f.write_text(server_file(**{"7": ["c", "c"]})),
            "names an image twice",
        ),
        (
            "a.json",
            lambda f: f.write_text(server_file()[:-1] + ', "7": ["a"]}'),
            "the key '7' stands twice",
        ),
        ("a.json.gz", lambda f: f.write_bytes(b"no gzip"), "cannot be read"),
        ("a.json.gz", lambda f: f.write_bytes(damaged_gzip()), "cannot be read"),
        ("a.npz", lambda f: f.write_bytes(b"PK\x03\x04" + b"x" * 90), "is not an archive"),
    ],
)
def test_files_that_are_not_scores_are_named(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as raised:
        read_systems(tmp_path)
    assert name in str(raised.value)


def test_two_files_of_one_name_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", SCORES)
    save_file({"x": SCORES}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="are both named 'a'"):
        read_systems(tmp_path)
