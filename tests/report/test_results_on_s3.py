"""A fusion that is trained, and used, with everything on a real S3-protocol server."""

import json
from pathlib import Path

import pytest

from dafm_ray.cli import main
from dafm_ray.config import FusionConfig, NetworkConfig, Recipe, to_yaml
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

FUSION = {
    "config.json",
    "config.yaml",
    "folds.parquet",
    "fusion.safetensors",
    "status.json",
    "temperature.csv",
    "report/metrics.json",
    "report/report.html",
}


def test_rankings_and_exports_on_s3_are_those_on_disk(object_store, tmp_path, capsys):
    dataset = labelled_dataset(20, 12)
    store = score_store(object_store.uri("val"), dataset, ("a", "b"), Grid(64, 12, 20))
    for command, option in (
        (["rank", "--fusion", "mean@zscore"], "--out"),
        (["tiles", "export"], "--to"),
    ):
        here, there = tmp_path / "x.parquet", object_store.uri("x.parquet")
        assert main([*command, store.uri, option, str(here)]) == 0
        capsys.readouterr()
        assert main([*command, store.uri, option, there]) == 0
        assert capsys.readouterr().out.startswith("s3://stores/x.parquet?")
        assert (
            open_storage(object_store.uri("")).read("x.parquet").to_pybytes() == here.read_bytes()
        )


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(170)
def test_a_fusion_is_trained_and_used_on_s3(object_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset = labelled_dataset(60, 40)
    store = score_store(object_store.uri("val"), dataset, ("a", "b"), Grid(64, 40, 60), signal=2.0)
    recipe, network = Recipe(epochs=2, batch=16), NetworkConfig(width=4)
    out = object_store.uri("fusion")
    config = FusionConfig(store.uri, out, folds=3, network=network, recipe=recipe, cases=1)
    Path("job.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert main(["fuse", "train", "--config", "job.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "fusion: s3://stores/fusion?" in printed
    assert "report: s3://stores/fusion/report/report.html?" in printed
    written = open_storage(out)
    assert set(written.list("")) >= FUSION
    assert json.loads(written.read("status.json").to_pybytes())["done"] == 2
    assert "lightfusion" in json.loads(written.read("config.json").to_pybytes())["metrics"]
    trained = written.read("fusion.safetensors").to_pybytes()

    other = labelled_dataset(50, 30, seed=3, split="test")
    test = score_store(object_store.uri("test"), other, ("a", "b"), Grid(64, 30, 50), seed=3)
    report = object_store.uri("report")
    command = ["evaluate", test.uri, "--out", report, "--cases", "0", "--fusion", out]
    assert main(command) == 0
    assert main([*command, "--against", report]) == 0
    listed = set(open_storage(report).list(""))
    assert {"report.html", "metrics.json", "figures/temperature.svg", "table.tex"} <= listed

    assert main(["fuse", "train", "--config", "job.yaml"]) == 0  # there is nothing left to do
    assert written.read("fusion.safetensors").to_pybytes() == trained
    changed = ["--set", "recipe.epochs=3"]
    assert main(["fuse", "train", "--config", "job.yaml", *changed]) == 2
    assert "s3://stores/fusion?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]
