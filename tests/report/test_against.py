import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dafm_ray.config import EvaluateConfig
from dafm_ray.errors import DataError
from dafm_ray.report.evaluate import evaluate
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

DATASET = labelled_dataset(60, 90)


def config(tmp_path, name, signal, dataset=DATASET, **other):
    store = score_store(tmp_path / name, dataset, grid=Grid(64, 90, 61), signal=signal, **other)
    return EvaluateConfig(
        store=store.uri, out=str(tmp_path / f"{name}_report"), fusions=("mean@zscore",), cases=0
    )


@pytest.fixture
def weaker(tmp_path):
    one = config(tmp_path, "weaker", 1.0)
    evaluate(one)
    return one


def found(config):
    evaluate(config)
    return json.loads(Path(config.out, "metrics.json").read_text(encoding="utf-8"))


def test_equal_runs_differ_by_nothing(weaker, tmp_path):
    again = replace(weaker, out=str(tmp_path / "again"), against=weaker.out)
    notes = evaluate(again).notes
    assert any("hits the same queries at R@10 as" in note for note in notes)
    against = found(again)["against"]
    assert [(one["here"], one["there"]) for one in against["systems"]] == [
        (name, name) for name in ("a", "b", "mean@zscore")
    ]
    for one in against["systems"]:
        for paired in one["metrics"].values():
            assert (paired["win"], paired["loss"], paired["diff"]) == (0, 0, 0.0)
        assert {"R@1", "R@10", "Rsubset@1", "Rmean"} <= set(one["metrics"])


def test_a_better_run_is_significantly_above(weaker, tmp_path):
    better = replace(config(tmp_path, "better", 3.0), against=f"{weaker.out}/metrics.json")
    now, before = found(better), json.loads(Path(weaker.out, "metrics.json").read_text())
    percents = [
        {s["name"]: s["metrics"]["R@10"] for s in run["systems"] if s["kind"] != "oracle"}
        for run in (now, before)
    ]
    for one in now["against"]["systems"]:
        paired = one["metrics"]["R@10"]
        expected = percents[0][one["here"]] - percents[1][one["there"]]
        assert paired["diff"] == pytest.approx(expected, abs=1e-3)
        assert paired["p_holm"] < 0.05
    page = Path(better.out, "report.html").read_text(encoding="utf-8")
    assert f"Against {weaker.out}: " in page
    assert "the best there, significant at 95 %" in page


def test_the_best_of_each_are_compared_whatever_they_are_called(weaker, tmp_path):
    other = config(tmp_path, "other", 2.0, models=("x", "y"))
    against = found(replace(other, against=weaker.out, fusions=("rrf",)))["against"]
    [pair] = [(one["here"], one["there"]) for one in against["systems"]]
    assert pair[0] in ("x", "y", "rrf")
    assert pair[1] in ("a", "b", "mean@zscore")


def test_other_queries_are_refused(weaker, tmp_path):
    fewer = replace(DATASET, queries=DATASET.queries[:-1])
    with pytest.raises(DataError, match=r"same queries: 1 are in one alone, as 'val-q[0-9]+'"):
        evaluate(replace(config(tmp_path, "fewer", 1.0, fewer), against=weaker.out))


def test_another_gallery_or_policy_is_refused(weaker, tmp_path):
    gallery = labelled_dataset(61, 90)
    with pytest.raises(DataError, match=r"has galleries .* one protocol compare"):
        evaluate(replace(config(tmp_path, "gallery", 1.0, gallery), against=weaker.out))
    kept = labelled_dataset(60, 90, policy="keep")
    with pytest.raises(DataError, match="has reference policy 'mask'"):
        evaluate(replace(config(tmp_path, "kept", 1.0, kept), against=weaker.out))


def test_files_of_two_evaluations_are_refused(weaker, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    ranks = pq.read_table(Path(weaker.out, "ranks.parquet"))
    ones = pa.array([1] * len(ranks), pa.int64())
    pq.write_table(ranks.set_column(2, "rank", ones), folder / "ranks.parquet")
    (folder / "metrics.json").write_bytes(Path(weaker.out, "metrics.json").read_bytes())
    with pytest.raises(DataError, match=r"do not have the same hits for a; .* of two evaluations"):
        evaluate(replace(weaker, out=str(tmp_path / "out"), against=str(folder)))


@pytest.mark.parametrize("damage", ["nothing", "text", "columns"])
def test_what_is_no_evaluation_is_refused(weaker, tmp_path, damage):
    folder = tmp_path / "run"
    folder.mkdir()
    if damage != "nothing":
        for name in ("metrics.json", "ranks.parquet"):
            (folder / name).write_bytes(Path(weaker.out, name).read_bytes())
    if damage == "text":
        (folder / "ranks.parquet").write_text("no table")
    if damage == "columns":
        (folder / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match="is no evaluation"):
        evaluate(replace(weaker, out=str(tmp_path / "out"), against=str(folder)))
