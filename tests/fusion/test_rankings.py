import numpy as np
import pyarrow.parquet as pq
import pytest

from dafm_ray.cli import main
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.fusion import rank
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.rankings import write_rankings
from dafm_ray.fusion.static import static_fusion
from dafm_ray.fusion.systems import Maker
from tests.samples import labelled_dataset, score_store


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "store", labelled_dataset(23, 17))


def system_named(store, name):
    [system] = Maker([name]).on(store).systems
    return system


def written(store, name, top, file):
    write_rankings(store, system_named(store, name), top, file)
    return pq.read_table(file)


@pytest.mark.parametrize("name", ["mean@zscore", "rrf", "m0"])
def test_rankings_are_those_of_sorting_all_fused_scores(tmp_path, store, name):
    name = store.models[0] if name == "m0" else name
    found = written(store, name, 5, tmp_path / "r.parquet").to_pylist()
    system = system_named(store, name)
    expected = []
    for chunk in masked_scores(store):
        for row, q in enumerate(chunk.rows):
            scores_N = system(chunk.scores_MBN, np.array(chunk.rows))[row]
            order = sorted(
                (n for n in range(len(scores_N)) if not np.isnan(scores_N[n])),
                key=lambda n: (-scores_N[n], n),
            )
            for place, n in enumerate(order[:5], 1):
                id = store.gallery_ids[n]
                expected.append((store.queries[q].id, place, id, np.float32(scores_N[n])))
    assert [tuple(row.values()) for row in found] == expected
    excluded = {(query.id, id) for query in store.queries for id in query.excluded}
    assert excluded
    assert not excluded & {(row["query"], row["candidate"]) for row in found}


def test_rankings_do_not_depend_on_chunks(tmp_path, store, monkeypatch):
    first = written(store, "mean@zscore", 30, tmp_path / "a.parquet")
    monkeypatch.setattr(rank, "CHUNK_SCORES", 1)
    assert written(store, "mean@zscore", 30, tmp_path / "b.parquet").equals(first)
    metadata = first.schema.metadata
    assert metadata[b"dafm_ray.system"] == static_fusion("mean").name.encode()
    assert metadata[b"dafm_ray.store"] == store.manifest.title.encode()


def test_an_incomplete_store_and_a_wrong_top_leave_no_file(tmp_path, store):
    file = tmp_path / "r.parquet"
    with pytest.raises(ConfigError, match="at least 1"):
        write_rankings(store, static_fusion("mean"), 0, file)
    store.storage.delete(next(p for p in store.storage.list("records") if "scores" in p))
    with pytest.raises(DataError, match="lacks 1 tiles"):
        write_rankings(store, static_fusion("mean"), 5, file)
    assert not file.exists()


def test_by_command(tmp_path, store, capsys):
    file = tmp_path / "r.parquet"
    arguments = ["rank", store.uri, "--top", "3", "--out", str(file)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == f"{file}: mean@zscore"
    assert pq.read_table(file).num_rows == 3 * 17
    assert main([*arguments, "--fusion", "mena"]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert "mean" in error
    assert store.models[0] in error
    assert main([*arguments, "--tune-on", store.uri]) == DataError.exit_code
    assert "would be a leak" in capsys.readouterr().err
