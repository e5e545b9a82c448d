import importlib.resources
import json
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest

from dafm_ray.config import load_config
from dafm_ray.demo.run import STAGES, demo_models, run_demo
from dafm_ray.evaluation.significance import Resampling, compare
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.models.registry import load_model

COMPOSED = ("clip4cir-sum", "tgcir", "blip4cir", "sprc")
SINGLES = {*COMPOSED, "image-only", "text-only"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory, local_ray):
    out = tmp_path_factory.mktemp("demo")
    said = []
    evaluation = run_demo(out, from_scratch=False, say=said.append)
    return out, evaluation, said


@pytest.fixture(scope="module")
def metrics(demo):
    return json.loads((demo[0] / "report" / "metrics.json").read_text())


@pytest.mark.timeout(400)
def test_the_demo_reaches_what_the_protocol_asks(metrics):
    systems = {system["name"]: system for system in metrics["systems"]}
    singles = [s for s in systems.values() if s["kind"] == "single"]
    assert {s["name"] for s in singles} == SINGLES
    assert (metrics["queries"], metrics["gallery"]) == (2324, 1710)
    best = max(singles, key=lambda s: s["metrics"]["R@10"])
    assert best["metrics"]["R@1"] >= 35
    assert best["metrics"]["R@10"] >= 66
    assert set(best["metrics"]) == {
        *(f"R@{k}" for k in (1, 5, 10, 50)),
        *(f"Rsubset@{k}" for k in (1, 2, 3)),
        "Rmean",
    }
    fused = systems["convex@zscore"]
    assert fused["vs"][best["name"]]["diff"] > 0
    assert fused["metrics"]["R@1"] > best["metrics"]["R@1"] + 1
    learned = systems["lightfusion"]
    assert learned["vs"]["mean@zscore"]["ci95"][0] > 0
    assert learned["vs"]["convex@zscore"]["ci95"][1] > 0


@pytest.mark.timeout(60)
def test_each_model_is_ten_points_above_the_image_alone(demo):
    ranks = pq.read_table(demo[0] / "report" / "ranks.parquet").to_pandas()
    hits = {
        name: (rows.sort_values("query")["rank"].to_numpy() <= 10).astype(np.float64)
        for name, rows in ranks.groupby("system", observed=True)
    }
    resampling = Resampling([""] * 2324)
    for name in COMPOSED:
        [paired] = compare([("R@10", hits[name], hits["image-only"])], resampling)
        assert paired.diff >= 10, (name, paired)
        assert paired.p < 0.01


@pytest.mark.timeout(60)
def test_the_models_hit_different_queries(metrics):
    overlap = metrics["overlap"]
    assert set(overlap["hits"]) == SINGLES
    for one, other in combinations(COMPOSED, 2):
        assert overlap["jaccard"][one][other] < 0.9
        assert min(overlap["gained"][one][other], overlap["gained"][other][one]) > 20
    assert overlap["any"] > max(overlap["hits"].values()) + 100


@pytest.mark.timeout(60)
def test_a_second_run_finds_its_tiles(demo):
    out, first, _ = demo
    said = []
    second = run_demo(out, from_scratch=False, say=said.append)
    assert sum("  0 blocks computed" in line for line in said) == 1
    assert second.table == first.table


@pytest.mark.timeout(60)
def test_the_report_shows_pictures_of_every_system(demo):
    out, evaluation, _ = demo
    text = (out / "report" / "report.html").read_text()
    systems = len(evaluation.table.systems)
    assert text.count("<img") >= 12 * (2 + 5 * systems)
    assert "Which queries differ" in text
    assert len(text) < 3_000_000


def test_the_shipped_weights_are_those_of_the_shipped_configurations():
    folder = importlib.resources.files("dafm_ray.demo")
    ids = {model.name: model.id for model in demo_models()}
    for stage in STAGES.keys() - {"blip4cir_towers"}:
        start = {"blip4cir": "blip4cir_towers"}.get(stage, stage)
        config = load_config(FinetuneConfig, str(folder / f"{start}.yaml"))
        name = {"clip4cir_sum": "clip4cir-sum"}.get(stage, stage)
        sizes = load_model(ids[name]).sizes.to_json()
        wanted = config.scratch["towers"]
        assert {key: sizes[key] for key in wanted} == {
            key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()
        }
    shipped = sum(file.stat().st_size for file in (folder / "weights").iterdir())
    assert shipped < 12_000_000
