import json
from dataclasses import replace

import pytest

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig, EvaluateConfig, ModelConfig, PrecomputeConfig
from dafm_ray.datasets.fashioniq import CATEGORIES
from dafm_ray.datasets.icons import IconSource
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.report.evaluate import evaluate
from dafm_ray.tiles.precompute import precompute_together
from dafm_ray.tiles.store import TileStore

WEIGHTS = "package://dafm_ray.demo/weights/clip4cir_sum.safetensors"
SUM = (ModelConfig("sum", f"clip4cir:sum@{WEIGHTS}"),)


@pytest.fixture(scope="module", params=["cirr-like", "fashioniq-like"])
def layout(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / request.param
    assert main(["data", "make", request.param, "--from", "icons", "--out", str(out)]) == 0
    return request.param, out


def ranks(store: TileStore, out) -> dict[tuple[str, str], tuple[int, ...]]:
    """(reference, target) -> rank, as `evaluate` writes it."""
    import pyarrow.parquet as pq

    evaluate(EvaluateConfig(store=store.uri, out=str(out), fusions=(), cases=0))
    rows = pq.read_table(out / "ranks.parquet").to_pylist()
    rank = {row["query"]: row["rank"] for row in rows}
    return {(q.reference, q.targets[0]): rank[q.id] for q in store.queries}


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(170)
def test_the_whole_way_gives_the_hits_of_the_icons(layout, tmp_path):
    kind, root = layout
    if kind == "cirr-like":
        made = load_dataset(DatasetConfig("cirr", "val", root=str(root)))
        icons = load_dataset(DatasetConfig("icons", "val"))
    else:
        made = load_dataset(DatasetConfig("fashioniq", "val", root=str(root), category="toptee"))
        drawn = replace(made.gallery, locators=made.gallery.ids)
        icons = replace(made, gallery=drawn, source=IconSource())
    asked = {(q.reference, q.targets[0]) for q in made.queries[::3]}
    made, icons = (
        replace(d, queries=tuple(q for q in d.queries if (q.reference, q.targets[0]) in asked))
        for d in (made, icons)
    )
    names = ("made", "icons")
    configs = [PrecomputeConfig(DatasetConfig("cirr"), SUM, str(tmp_path / n)) for n in names]
    outcomes = precompute_together(configs, [made, icons])
    found = {
        name: ranks(outcome.store, tmp_path / f"{name}-report")
        for name, outcome in zip(names, outcomes, strict=True)
    }
    assert found["made"].keys() == found["icons"].keys()
    twins = {
        (q.reference, q.targets[0])
        for q in icons.queries
        if len(q.targets) > 1 or len(q.excluded) > 1
    }
    differ = {pair for pair in found["made"] if found["made"][pair] != found["icons"][pair]}
    # CIRR knows one target and masks one picture: only queries with pixel twins may differ.
    assert differ <= twins
    assert len(twins) < 10
    hits = sum(rank <= 10 for rank in found["made"].values())
    assert hits / len(found["made"]) > 0.6


def test_the_published_layout_is_complete(layout):
    kind, root = layout
    if kind == "cirr-like":
        splits = {"train": (4204, 6919), "val": (1382, 1673), "test1": (1710, 2324)}
        for split, sizes in splits.items():
            dataset = load_dataset(DatasetConfig("cirr", split, root=str(root)))
            assert (len(dataset.gallery), len(dataset.queries)) == sizes
            assert any(query.targets for query in dataset.queries) == (split != "test1")
    else:
        for split, total in (("train", 4204), ("val", 1382), ("test", 1710)):
            datasets = [
                load_dataset(DatasetConfig("fashioniq", split, root=str(root), category=category))
                for category in CATEGORIES
            ]
            assert sum(len(dataset.gallery) for dataset in datasets) == total
            assert all(len(query.captions) == 2 for d in datasets for query in d.queries)
    values = json.loads(next((root / "captions").glob("*.json")).read_text())
    assert isinstance(values, list)


def test_a_folder_in_use_and_wrong_names_are_refused(tmp_path, capsys):
    (tmp_path / "a").touch()
    assert main(["data", "make", "cirr-like", "--out", str(tmp_path)]) == 3
    assert "is not empty" in capsys.readouterr().err
    assert main(["data", "make", "cirr", "--out", str(tmp_path / "new")]) == 2
    assert "did you mean 'cirr-like'" in capsys.readouterr().err
    assert main(["data", "make", "cirr-like", "--from", "x", "--out", str(tmp_path / "new")]) == 2
    assert "no source 'x'" in capsys.readouterr().err
