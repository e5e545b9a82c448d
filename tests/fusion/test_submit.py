import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.evaluation.submission import check_submission
from dafm_ray.evaluation.submission_format import LENGTHS
from dafm_ray.fusion import rank
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.static import static_fusion
from dafm_ray.fusion.submit import write_submission
from dafm_ray.tiles.ingest import ingest
from tests.samples import cirr_dataset, labelled_dataset, score_store

MEAN = static_fusion("mean@zscore")


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "store", cirr_dataset())


def lists_of(folder, metric):
    values = json.loads((folder / f"{metric}.json").read_text())
    assert values.pop("version") == "rc2"
    assert values.pop("metric") == metric
    return values


def sorted_by_fused_scores(store, system, metric):
    """The lists as they come out of sorting all fused scores."""
    lists = {}
    for chunk in masked_scores(store):
        fused_BN = system(chunk.scores_MBN, np.array(chunk.rows))
        for scores_N, q in zip(fused_BN, chunk.rows, strict=True):
            query = store.queries[q]
            pool = query.group if metric == "recall_subset" else store.gallery_ids
            named = [store.positions[name] for name in pool if name != query.reference]
            best = sorted(named, key=lambda n, scores_N=scores_N: (-scores_N[n], n))
            lists[query.id] = [store.gallery_ids[n] for n in best[: LENGTHS[metric]]]
    return lists


@pytest.mark.parametrize("name", ["mean@zscore", "rrf"])
@pytest.mark.parametrize("metric", LENGTHS)
def test_lists_are_those_of_sorting_all_fused_scores(tmp_path, store, name, metric):
    system = static_fusion(name)
    checks = write_submission(store, system, tmp_path / "out")
    assert list(lists_of(tmp_path / "out", metric)) == [query.id for query in store.queries]
    assert lists_of(tmp_path / "out", metric) == sorted_by_fused_scores(store, system, metric)
    file = tmp_path / "out" / f"{metric}.json"
    assert checks[file].faults == ()
    assert replace(checks[file], notes=()) == check_submission(
        file, store.queries, store.gallery_ids
    )
    assert next(checks[file].lines()) == f"sound ({metric}, 12 queries)"


def test_lists_do_not_depend_on_chunks(tmp_path, store, monkeypatch):
    write_submission(store, MEAN, tmp_path / "a")
    monkeypatch.setattr(rank, "CHUNK_SCORES", 1)
    write_submission(store, MEAN, tmp_path / "b")
    for metric in LENGTHS:
        assert lists_of(tmp_path / "a", metric) == lists_of(tmp_path / "b", metric)


def test_one_file_alone(tmp_path, store):
    [file] = write_submission(store, MEAN, tmp_path / "out", ["recall_subset"])
    assert [file] == list((tmp_path / "out").iterdir())


def each_query(dataset, **changes):
    return replace(dataset, queries=tuple(replace(query, **changes) for query in dataset.queries))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (labelled_dataset(60, 12), "holds labelled val under protocol cirr"),
        (replace(cirr_dataset(), protocol="folder"), "holds cirr val under protocol folder"),
        (each_query(cirr_dataset(), group=()), "12 queries of .* have no group to rank"),
        (cirr_dataset(50), r"mean@zscore ranks only 49 images of the gallery for query '10\d\d'"),
        (each_query(cirr_dataset(), excluded=()), "would refuse it:\n.*its own reference"),
    ],
)
def test_what_the_server_would_refuse_is_not_written(tmp_path, dataset, message):
    store = score_store(tmp_path / "store", dataset)
    with pytest.raises(DataError, match=message):
        write_submission(store, MEAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_incomplete_store_is_refused(tmp_path, store):
    store.storage.delete(next(p for p in store.storage.list("records") if "scores" in p))
    with pytest.raises(DataError, match="lacks 1 tiles"):
        write_submission(store, MEAN, tmp_path / "out")


def first_ranked(parquet):
    """The lists of `dafm rank`."""
    lists = {}
    for row in pq.read_table(parquet).to_pylist():
        lists.setdefault(row["query"], []).append(row["candidate"])
    return lists


@pytest.mark.parametrize("options", [[], ["--fusion", "a+bank:0.5"], ["--tune-on", "OTHERS"]])
def test_by_command_as_rank_ranks(tmp_path, store, capsys, options):
    others = score_store(tmp_path / "others", labelled_dataset(40, 30, split="tune"), seed=5)
    named = [others.uri if option == "OTHERS" else option for option in options]
    out, file = tmp_path / "out", tmp_path / "ranked.parquet"
    assert main(["submission", "write", store.uri, "--out", str(out), *named]) == 0
    name, *sound = capsys.readouterr().out.splitlines()
    files = [str(out / f"{metric}.json") for metric in LENGTHS]
    odd = "odd: 12 queries of cirr val; the server ranks the 4,148 of test1 and refuses others"
    lines = zip(files, LENGTHS, strict=True)
    assert sound == [
        f"{name}: {line}" for name, m in lines for line in (f"sound ({m}, 12 queries)", odd)
    ]
    assert main(["rank", store.uri, "--out", str(file), *named]) == 0
    assert capsys.readouterr().out.strip() == name.replace(str(out), str(file))
    assert lists_of(out, "recall") == first_ranked(file)
    assert main(["submission", "check", *files]) == DataError.exit_code
    assert "it holds 12 lists, and test1 has 4,148 queries" in capsys.readouterr().out


def test_refusals_by_command(tmp_path, store, capsys):
    write = ["submission", "write", store.uri, "--out", str(tmp_path / "out")]
    assert main([*write, "--fusion", "mena"]) == ConfigError.exit_code
    assert main([*write, "--tune-on", store.uri]) == DataError.exit_code
    assert "would be a leak" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*write[:-1], str(tmp_path / "file" / "out")]) == MachineError.exit_code


def test_scores_of_cirr_val_become_files_that_its_annotations_accept(
    reference_material, tmp_path, capsys
):
    store = str(tmp_path / "store")
    ingest(str(reference_material / "scores" / "cirr_val"), store)
    out, file = tmp_path / "out", tmp_path / "ranked.parquet"
    assert main(["submission", "write", store, "--out", str(out)]) == 0
    assert main(["rank", store, "--out", str(file)]) == 0
    assert lists_of(out, "recall") == first_ranked(file)
    capsys.readouterr()
    files = [str(out / f"{metric}.json") for metric in LENGTHS]
    annotations = ["--annotations", str(reference_material / "data" / "cirr"), "--split", "val"]
    assert main(["submission", "check", *files, *annotations]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: sound ({metric}, 4,181 queries)"
        for file, metric in zip(files, LENGTHS, strict=True)
    ]


def test_a_published_file_comes_back_as_it_was(reference_material, tmp_path, capsys):
    published = reference_material / "golden" / "rank_lists" / "cirplant.json.gz"
    (tmp_path / "lists").mkdir()
    shutil.copy(published, tmp_path / "lists")
    named = DatasetConfig("cirr", "test1", annotations=str(reference_material / "data" / "cirr"))
    store = ingest(str(tmp_path / "lists"), str(tmp_path / "store"), named).store
    write = ["submission", "write", store.uri, "--fusion", "cirplant", "--out", str(tmp_path)]
    assert main(write) == DataError.exit_code
    assert "cirplant ranks only" in capsys.readouterr().err
    assert main([*write, "--metric", "recall"]) == 0
    with gzip.open(published) as stream:
        assert json.loads((tmp_path / "recall.json").read_text()) == json.load(stream)
