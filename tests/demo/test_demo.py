import json

import pytest

from dafm_ray.config import FinetuneConfig, load_config
from dafm_ray.demo.run import STAGES, demo_models, run_demo
from dafm_ray.models.registry import load_model

SINGLES = {"clip4cir-sum", "clip4cir-combiner", "image-only", "text-only"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory, local_ray):
    out = tmp_path_factory.mktemp("demo")
    said = []
    evaluation = run_demo(out, from_scratch=False, say=said.append)
    return out, evaluation, said


@pytest.mark.timeout(400)
def test_the_demo_reaches_what_the_protocol_asks(demo):
    out, _, _ = demo
    found = json.loads((out / "report" / "metrics.json").read_text())
    systems = {system["name"]: system for system in found["systems"]}
    singles = [s for s in systems.values() if s["kind"] == "single"]
    assert {s["name"] for s in singles} == SINGLES
    assert (found["queries"], found["gallery"]) == (2324, 1710)
    best = max(singles, key=lambda s: s["metrics"]["R@10"])
    assert best["metrics"]["R@1"] >= 35
    assert best["metrics"]["R@10"] >= 60
    assert set(best["metrics"]) == {
        *(f"R@{k}" for k in (1, 5, 10, 50)),
        *(f"Rsubset@{k}" for k in (1, 2, 3)),
        "Rmean",
    }
    fused = systems["convex@zscore"]["vs"][best["name"]]
    assert fused["ci95"][0] > 0
    assert systems["image-only"]["vs"][best["name"]]["diff"] < -30


@pytest.mark.timeout(60)
def test_a_second_run_finds_its_tiles(demo):
    out, first, _ = demo
    said = []
    second = run_demo(out, from_scratch=False, say=said.append)
    assert sum("0 blocks computed" in line for line in said) == 2
    assert second.table == first.table


@pytest.mark.timeout(60)
def test_the_report_shows_pictures_of_every_system(demo):
    out, _, _ = demo
    text = (out / "report" / "report.html").read_text()
    assert text.count("<img") >= 12 * (2 + 5 * 11)
    assert len(text) < 3_000_000


def test_the_shipped_weights_are_those_of_the_shipped_configurations():
    import importlib.resources

    ids = {model.name: model.id for model in demo_models()}
    for stage, name in zip(STAGES, ("clip4cir-sum", "clip4cir-combiner"), strict=True):
        file = importlib.resources.files("dafm_ray.demo") / f"{stage}.yaml"
        config = load_config(FinetuneConfig, str(file))
        sizes = load_model(ids[name]).sizes.to_json()
        wanted = config.scratch["towers"]
        assert {key: sizes[key] for key in wanted} == {
            key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()
        }
