import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.tiles.manifest import Grid, ModelEntry
from dafm_ray.tiles.store import Failure, TileStore, feature_key, score_key, spans
from tests.samples import labelled_dataset, score_matrix, score_store

ENTRY = ModelEntry("test:a@random", "a")


@pytest.fixture
def dataset():
    return labelled_dataset(23, 17)


@pytest.fixture
def store(tmp_path, dataset):
    return score_store(tmp_path / "store", dataset)


def create(uri, dataset, **models):
    return TileStore.create(str(uri), dataset, {"name": "x"}, models, Grid(4, 5, 7), "float32")


@given(st.integers(0, 50), st.integers(1, 20))
def test_spans_cover_everything_once(size, step):
    assert [n for span in spans(size, step) for n in span] == list(range(size))


def test_tiles_join_to_the_score_matrix(store, dataset):
    rows = [store.scores("b", block) for block in range(len(store.tile_rows))]
    assert np.array_equal(np.concatenate(rows), score_matrix(dataset, 1))
    assert store.queries == dataset.queries
    assert store.gallery_ids == dataset.gallery.ids
    assert store.source_order == dataset.gallery.source_order


def test_one_tile_over_the_gallery_is_read_without_a_copy(tmp_path, dataset):
    store = score_store(tmp_path, dataset, grid=Grid(4, 5, 100))
    assert not store.scores("a", 0).flags.owndata


def test_features_cross_block_borders(tmp_path, dataset):
    store = create(tmp_path, dataset, a=ENTRY)
    whole = np.arange(23 * 2, dtype=np.float32).reshape(23, 2)
    for block, rows in enumerate(spans(23, 4)):
        store.write(feature_key("a", "gallery", block), whole[rows.start : rows.stop])
    store.finished()
    assert store.features("a", "gallery", range(3, 14)).tolist() == whole[3:14].tolist()
    assert store.features("a", "gallery", range(20, 23)).tolist() == whole[20:].tolist()


def test_a_block_without_its_record_does_not_exist(store):
    key = score_key("a", 1, 2)
    [record] = [path for path in store.storage.list("records") if key in path]
    store.storage.delete(record)
    assert key not in store.finished()
    assert store.missing() == [key]
    with pytest.raises(DataError, match="not there yet"):
        store.read(key)


def test_every_flipped_bit_is_found_at_the_first_open_and_by_verify(store, tmp_path):
    key = score_key("a", 0, 0)
    [path] = (tmp_path / "store").glob(f"{key}.*.arrow")
    honest = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        flipped = bytearray(honest)
        flipped[rng.integers(len(honest))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="damaged; run"):
            TileStore(store.uri).read(key)
    assert [problem for _, problem in store.verify() if problem] == ["damaged"]
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        TileStore(store.uri).read(key)
    assert [problem for _, problem in store.verify() if problem] == ["missing"]


def test_checksums_are_trusted_after_the_first_open(store, monkeypatch):
    store.read(score_key("a", 0, 0))
    monkeypatch.setattr("dafm_ray.tiles.blocks.checksum", lambda data: "never")
    store.read(score_key("a", 0, 0))


@pytest.mark.parametrize("name", ["gallery.arrow", "queries.arrow"])
def test_a_damaged_table_is_found(store, tmp_path, name):
    path = tmp_path / "store" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    opened = TileStore(store.uri)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        _ = opened.gallery_ids, opened.queries


def test_a_damaged_record_is_found(store, tmp_path):
    record = next((tmp_path / "store" / "records").rglob("*.json"))
    record.write_text("{}")
    assert "the record is damaged" in [problem for _, problem in store.verify()]


def test_a_store_of_another_gallery_or_other_queries_is_refused(store, dataset):
    other = labelled_dataset(24, 17)
    with pytest.raises(DataError, match="another gallery"):
        create(store.uri, other, a=ENTRY)
    changed = replace(dataset, queries=dataset.queries[1:])
    with pytest.raises(DataError, match="another queries"):
        create(store.uri, changed, a=ENTRY)


def test_other_weights_under_the_same_name_are_refused(store, dataset):
    with pytest.raises(DataError, match="'a' with other weights"):
        create(store.uri, dataset, a=ModelEntry("test:a@random", "changed"))


def test_another_family_or_variant_under_the_same_name_is_refused(store, dataset):
    with pytest.raises(DataError, match="give the new one another name"):
        create(store.uri, dataset, a=ModelEntry("test:b@random", "a"))
    moved = create(store.uri, dataset, a=ModelEntry("test:a@/elsewhere", "a"))
    assert moved.manifest.models["a"].id == "test:a@random"


def test_a_model_that_never_finished_a_block_goes_with_the_next_run(store, dataset):
    broken = create(store.uri, dataset, a=ENTRY, broken=ModelEntry("test:x@bad.pt", "x"))
    assert "broken" in broken.models
    assert create(store.uri, dataset, a=ENTRY).models == ("a", "b")


def test_repair_drops_what_is_not_sound(store, tmp_path):
    flipped, lost = score_key("a", 0, 0), score_key("b", 1, 1)
    [path] = (tmp_path / "store").glob(f"{flipped}.*.arrow")
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    next((tmp_path / "store").glob(f"{lost}.*.arrow")).unlink()
    assert len(store.repair()) == 2
    assert store.missing() == [flipped, lost]
    assert all(problem == "" for _, problem in store.verify())


def test_a_lost_table_is_written_again(store, dataset, tmp_path):
    (tmp_path / "store" / "queries.arrow").write_bytes(b"")
    assert create(store.uri, dataset, a=ENTRY).queries == dataset.queries


def test_forgetting_a_block_forgets_the_tiles_made_of_it(store):
    store.forget("gallery", 1)
    assert store.missing() == [score_key(m, q, n) for m in "ab" for q in range(4) for n in (0, 1)]


def test_strange_files_among_the_records_are_ignored(store, tmp_path):
    (tmp_path / "store" / "records" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "store" / "records" / "notes.json").write_bytes(b"x")
    assert all(problem == "" for _, problem in store.verify())
    assert store.missing() == []


def test_a_damaged_quarantine_is_named(store):
    store.storage.write("quarantine/gallery-000000.json", memoryview(b"["))
    with pytest.raises(DataError, match=r"gallery-000000\.json is damaged"):
        store.failures()


def test_a_model_can_be_added_later(store, dataset):
    added = create(store.uri, dataset, c=ModelEntry("test:c@random", "c"))
    assert added.models == ("a", "b", "c")
    assert TileStore(store.uri).models == ("a", "b", "c")
    assert added.missing(["a", "b"]) == []
    assert len(added.missing(["c"])) == 16


def test_an_existing_store_keeps_its_grid(store, dataset):
    again = TileStore.create(store.uri, dataset, {}, {"a": ENTRY}, Grid(1, 1, 1), "float16")
    assert again.manifest.grid == Grid(4, 5, 7)
    assert again.manifest.score_type == "float32"


def test_model_names_are_plain_file_names(tmp_path, dataset):
    with pytest.raises(ConfigError, match="model name"):
        create(tmp_path, dataset, **{"../up": ENTRY})


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(DataError, match="not a tile store"):
        TileStore(str(tmp_path))


def test_stores_travel_as_their_uri(store):
    assert pickle.loads(pickle.dumps(store)).manifest == store.manifest


def test_failures_are_kept_once(store):
    listed = [Failure("gallery", "x", "the file is empty")]
    for _ in range(2):
        store.quarantine("gallery", 3, listed)
    store.quarantine("queries", 0, [Failure("queries", "q", "the file is missing")])
    assert store.failures() == [*listed, Failure("queries", "q", "the file is missing")]


@settings(max_examples=200)
@given(data=st.data())
def test_killed_and_resumed_writers_leave_no_tile_missing_or_double(tmp_path_factory, data):
    """A writer may die before, between and after the bytes and the record of each block."""
    root = tmp_path_factory.mktemp("store")
    store = create(root, labelled_dataset(9, 7), a=ENTRY)
    values = {key: np.full((5, 7), n, np.float32) for n, key in enumerate(store.score_keys("a"))}
    while store.missing():
        for key in store.missing():
            fate = data.draw(st.sampled_from(["finish", "no record", "half a file", "dead"]))
            if fate == "finish":
                store.write(key, values[key])
                continue
            if fate == "no record":
                store.write(key, values[key])
                [record] = [path for path in store.storage.list("records") if key in path]
                store.storage.delete(record)
            if fate == "half a file":
                (root / f".{key.replace('/', '-')}.tmp").write_bytes(b"half")
            break
        store = TileStore(str(root))
    records = store.storage.list("records")
    assert len(records) == len(values)
    assert all(problem == "" for _, problem in store.verify())
    assert all(np.array_equal(store.read(key), values[key]) for key in values)
