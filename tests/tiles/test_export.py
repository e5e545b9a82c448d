import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dafm_ray.cli import main
from dafm_ray.errors import DataError, MachineError
from dafm_ray.tiles import export as module
from dafm_ray.tiles.export import export
from dafm_ray.tiles.ingest import ingest
from dafm_ray.tiles.store import TileStore
from tests.samples import labelled_dataset, score_store


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "s", labelled_dataset(23, 17))


def whole(store: TileStore, model: str) -> np.ndarray:
    return np.concatenate([store.scores(model, q) for q in range(len(store.tile_rows))])


def test_out_and_back_is_the_same_store(tmp_path, store, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_BYTES", 3 * 2 * 23 * 4)
    file = tmp_path / "new" / "scores.parquet"
    assert main(["tiles", "export", store.uri, "--to", str(file)]) == 0
    assert pq.ParquetFile(file).num_row_groups > 4
    assert main(["tiles", "ingest", str(file), "--out", str(tmp_path / "back")]) == 0
    back = TileStore(str(tmp_path / "back"))
    assert back.queries == store.queries
    assert back.gallery_ids == store.gallery_ids
    assert back.source_order == store.source_order
    assert back.manifest.models == store.manifest.models
    assert back.manifest.dataset == store.manifest.dataset
    assert back.manifest.queries_digest == store.manifest.queries_digest
    for model in store.models:
        assert np.array_equal(whole(back, model), whole(store, model))


def test_any_parquet_reader_sees_the_scores(tmp_path, store):
    export(store, str(tmp_path / "x.parquet"))
    table = pq.read_table(tmp_path / "x.parquet")
    about = json.loads(table.schema.metadata[b"dafm_ray"])
    assert about["gallery_ids"] == list(store.gallery_ids)
    assert table.schema.field("scores.a").type == pa.binary(23 * 4)
    assert table.column("id").to_pylist() == [query.id for query in store.queries]
    row = np.frombuffer(table.column("scores.b")[5].as_py(), dtype=about["dtype"])
    assert np.array_equal(row, whole(store, "b")[5])


def test_rows_in_another_order_are_aligned_by_id(tmp_path, store):
    export(store, str(tmp_path / "x.parquet"))
    table = pq.read_table(tmp_path / "x.parquet")
    digests = pq.ParquetFile(tmp_path / "x.parquet").metadata.metadata[b"dafm_ray.digests"]
    metadata = {**table.schema.metadata, b"dafm_ray.digests": digests}
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    written = shuffled.replace_schema_metadata(metadata)
    pq.write_table(written, tmp_path / "y.parquet", row_group_size=4)
    back = ingest(str(tmp_path / "y.parquet"), str(tmp_path / "back")).store
    assert np.array_equal(whole(back, "a"), whole(store, "a"))


def test_files_that_are_not_exports_are_refused(tmp_path, store):
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
    for name in ("a", "b"):
        with pytest.raises(DataError, match="is not a file that `dafm tiles export` wrote"):
            ingest(str(tmp_path / f"{name}.parquet"), str(tmp_path / "back"))


@pytest.fixture
def exported(tmp_path, store):
    export(store, str(tmp_path / "x.parquet"))
    table = pq.read_table(tmp_path / "x.parquet")
    digests = pq.ParquetFile(tmp_path / "x.parquet").metadata.metadata[b"dafm_ray.digests"]
    return table.replace_schema_metadata({**table.schema.metadata, b"dafm_ray.digests": digests})


def about(table, **changes):
    values = json.loads(table.schema.metadata[b"dafm_ray"])
    metadata = {**table.schema.metadata, b"dafm_ray": json.dumps({**values, **changes})}
    return table.replace_schema_metadata(metadata)


def column(table, name, values):
    return table.set_column(table.schema.get_field_index(name), name, values)


EDITS = {
    "a model lost": (lambda t: t.drop_columns(["scores.b"]), r"lacks the column 'scores\.b'"),
    "a label lost": (lambda t: t.drop_columns(["captions"]), "lacks the column 'captions'"),
    "number ids": (lambda t: column(t, "id", pa.array(range(len(t)))), "'id' must hold string"),
    "an empty reference": (
        lambda t: column(t, "reference", pa.array([None] * len(t), pa.string())),
        "'reference' has empty cells",
    ),
    "empty targets": (
        lambda t: column(t, "targets", pa.array([[None]] * len(t), pa.list_(pa.string()))),
        "'targets' has empty cells",
    ),
    "no scores": (
        lambda t: column(t, "scores.a", pa.array([None] * len(t), pa.binary(23 * 4))),
        "has empty cells",
    ),
    "another score": (
        lambda t: column(t, "scores.a", t.column("scores.b")),
        "the scores of a have changed since the export",
    ),
    "another target": (
        lambda t: column(t, "targets", t.column("group")),
        "labels or metadata have changed",
    ),
    "no models": (lambda t: about(t, models={}), "labels or metadata have changed"),
    "no digest of a model": (
        lambda t: about(t, models={m: {"id": "x", "weights_digest": ""} for m in "ab"}),
        "labels or metadata have changed",
    ),
    "no protocol": (lambda t: about(t, protocol="bogus"), "labels or metadata have changed"),
    "another policy": (lambda t: about(t, policy="keep"), "labels or metadata have changed"),
    "number gallery ids": (
        lambda t: about(t, gallery_ids=list(range(23))),
        "labels or metadata have changed",
    ),
    "a listed data set": (lambda t: about(t, dataset=[]), "labels or metadata have changed"),
    "a lost digest": (
        lambda t: t.replace_schema_metadata({b"dafm_ray": t.schema.metadata[b"dafm_ray"]}),
        "was rewritten since the export",
    ),
    "another format": (lambda t: about(t, format=9), "has format 9"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_exports_are_refused_with_one_message(tmp_path, exported, name, capsys):
    edit, message = EDITS[name]
    pq.write_table(edit(exported), tmp_path / "y.parquet")
    assert main(["tiles", "ingest", str(tmp_path / "y.parquet"), "--out", str(tmp_path / "n")]) == 3
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


def test_an_export_says_itself_what_it_is_about(tmp_path, exported, capsys):
    pq.write_table(exported, tmp_path / "y.parquet")
    ingested = ["tiles", "ingest", str(tmp_path / "y.parquet"), "--out", str(tmp_path / "n")]
    assert main([*ingested, "--dataset", "cirr", "--split", "val"]) == 2
    assert main([*ingested, "--split", "val"]) == 2
    assert "--split says nothing without --dataset" in capsys.readouterr().err
    assert main(ingested) == 0


def test_an_incomplete_store_and_a_folder_in_the_way(tmp_path, store):
    record = next((tmp_path / "s" / "records").rglob("*.json"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError, match="cannot write"):
        export(store, str(tmp_path / "folder"))
    record.unlink()
    with pytest.raises(DataError, match="lacks 1 tiles"):
        export(TileStore(store.uri), str(tmp_path / "x.parquet"))
    assert not (tmp_path / "x.parquet").exists()


def test_flipped_bits_are_found_without_a_traceback(tmp_path, store, capsys):
    export(store, str(tmp_path / "x.parquet"))
    data = (tmp_path / "x.parquet").read_bytes()
    rng = np.random.default_rng(0)
    for n in range(40):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "y.parquet").write_bytes(flipped)
        out = str(tmp_path / f"store-{n}")
        code = main(["tiles", "ingest", str(tmp_path / "y.parquet"), "--out", out])
        assert "Traceback" not in capsys.readouterr().err
        if code == 0:  # a bit that nothing reads
            back = TileStore(out)
            assert back.queries == store.queries
            assert np.array_equal(whole(back, "a"), whole(store, "a"))
        else:
            assert code == 3
