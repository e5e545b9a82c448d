import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dafm_ray.cli import main
from dafm_ray.config import DatasetConfig, RetrieveConfig, load_config, to_yaml
from dafm_ray.errors import DataError, MachineError
from dafm_ray.finetune.validation import validation_recall
from dafm_ray.models.registry import load_model
from dafm_ray.search.encode import encode_queries, open_model
from dafm_ray.search.gallery import gallery_index
from dafm_ray.search.retrieve import retrieve
from dafm_ray.storage import open_storage
from tests.object_store import every
from tests.samples import image_folder, open_folder

TINY = "clip4cir:sum@random-tiny"
TRAINED = "clip4cir:sum@package://dafm_ray.demo/weights/clip4cir_sum.safetensors"


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images", 20, 9)
    return RetrieveConfig(
        dataset=DatasetConfig("folder", root=str(root)),
        model=TINY,
        index=str(tmp_path / "index"),
        out=str(tmp_path / "out"),
        top=10,
        device="cpu",
        batch=4,
    )


def brute_force(config):
    dataset = open_folder(config.dataset.root)
    model = load_model(config.model)
    index, _ = gallery_index(model, "", dataset, None, batch=config.batch)
    parts = [dataset.queries[n : n + config.batch] for n in range(0, 9, config.batch)]
    features_QD = np.concatenate([encode_queries(model, dataset, p, "cpu")[0] for p in parts])
    scores_QN = features_QD.astype(np.float64) @ index.vectors.astype(np.float64).T
    scores_QN = scores_QN.astype(np.float32)
    rows = []
    for query, scores_N in zip(dataset.queries, scores_QN, strict=True):
        kept = [n for n, id in enumerate(index.ids) if id not in query.excluded]
        order = sorted(kept, key=lambda n: (-scores_N[n], n))[: config.top]
        rows += [(query.id, r, index.ids[n], scores_N[n]) for r, n in enumerate(order, 1)]
    return rows


@pytest.mark.parametrize("top", [10, 50])
def test_rankings_and_recalls_are_those_of_scoring_all(config, tmp_path, top):
    config = replace(config, model=TRAINED, top=top)
    found = retrieve(config)
    table = pq.read_table(tmp_path / "out" / "rankings.parquet")
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == brute_force(config)
    dataset = open_folder(config.dataset.root)
    recall, _ = validation_recall(load_model(TRAINED), [dataset], "cpu")
    counted = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert counted == json.loads(json.dumps(found.metrics))
    assert (counted["queries"], counted["gallery"], counted["protocol"]) == (9, 20, "folder")
    ours = {name: p for name, p in counted["metrics"].items() if name.startswith("R@")}
    assert ours == {f"R@{k}": round(recall[f"R@{k}"], 4) for k in (1, 5, 10, 50) if k <= top}
    assert found.failures == 0
    assert not (tmp_path / "out" / "quarantine.csv").exists()
    spent = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert (spent["queries"], spent["device"], spent["index"]) == (9, "cpu", "built now")
    assert 0 < spent["encode_ms"]["p50"] <= spent["encode_ms"]["p99"]
    assert retrieve(config).latency["index"] == "reused"


def test_index_and_results_on_s3_are_those_on_disk(config, tmp_path, object_store, capsys):
    retrieve(config)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    remote = replace(config, index=object_store.uri("index"), out=object_store.uri("out"))
    image = tmp_path / "images" / "000.png"
    image.rename(tmp_path / "away.png")
    image.write_bytes(b"")
    assert retrieve(remote).failures
    storage = open_storage(remote.out)
    assert "gallery,000.png" in storage.read("quarantine.csv").to_pybytes().decode()
    (tmp_path / "away.png").rename(image)
    object_store.fault = every(5, 503)
    file = tmp_path / "job.yaml"
    file.write_text(to_yaml(remote))
    assert main(["retrieve", "--config", str(file)]) == 0
    assert object_store.faults > 2
    assert "rankings: s3://stores/out/rankings.parquet?" in capsys.readouterr().out
    assert set(storage.list("")) == {*kept}
    assert storage.read("rankings.parquet").to_pybytes() == kept["rankings.parquet"]
    status = json.loads(storage.read("status.json").to_pybytes())
    assert (status["stage"], status["done"], status["total"]) == ("retrieve", 9, 9)
    assert retrieve(remote).latency["index"] == "reused"
    [made] = (tmp_path / "index").iterdir()
    open_storage(remote.index).write(f"{made.name}/index.faiss", pa.py_buffer(b"cut"))
    with pytest.raises(DataError, match=f"the index s3://stores/index/{made.name}"):
        retrieve(remote)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("local_ray")
def test_shards_rank_alike_and_are_not_kept(config, tmp_path):
    kept = retrieve(config)
    first = pq.read_table(tmp_path / "out" / "rankings.parquet")
    again = retrieve(replace(config, shards=3, index="nowhere"))
    assert pq.read_table(tmp_path / "out" / "rankings.parquet").equals(first)
    assert again.metrics == kept.metrics
    assert again.latency["shards"] == 3


def test_what_cannot_be_opened_is_listed_and_a_miss(config, tmp_path, capsys):
    (tmp_path / "images" / "000.png").write_bytes(b"")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"dataset: {{name: folder, root: {config.dataset.root}}}\nmodel: {TINY}\n"
        f"index: {config.index}\nout: {config.out}\ndevice: cpu\n"
    )
    assert main(["retrieve", "--config", str(file)]) == 4
    captured = capsys.readouterr()
    assert "3 items could not be used" in captured.err
    assert "index of 19 images, built now" in captured.out
    assert "encode, one query at a time: p50" in captured.out
    listed = (tmp_path / "out" / "quarantine.csv").read_text().splitlines()
    assert listed[1] == "gallery,000.png,the file is empty"
    assert {line.split(",")[1] for line in listed[2:]} == {"q0", "q1"}
    counted = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert counted["queries"] == 9
    assert counted["hits"]["R@50"] == 7
    ranked = pq.read_table(tmp_path / "out" / "rankings.parquet").to_pandas()
    assert set(ranked["query"]) == {f"q{n}" for n in range(2, 9)}
    assert "000.png" not in set(ranked["candidate"])


def test_a_model_of_text_alone_needs_no_reference(config, tmp_path):
    (tmp_path / "images" / "000.png").write_bytes(b"")
    dataset = open_folder(config.dataset.root)
    model = load_model("zeroshot:text@random-tiny")
    features_QD, lost = encode_queries(model, dataset, dataset.queries, "cpu")
    assert lost == []
    assert np.isfinite(features_QD).all()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="sees no GPU"):
        open_model(TINY, "cuda")
    assert open_model(TINY, "auto")[1] == "cpu"


def test_subset_recalls_score_every_member(config, tmp_path):
    """Also those that are not among the first `top`."""
    root = tmp_path / "images"
    lines = [json.loads(line) for line in (root / "queries.jsonl").read_text().splitlines()]
    for line in lines:
        others = [f"{n:03d}.png" for n in (11, 13, 17)]
        line["group"] = list(dict.fromkeys([line["reference"], *line["targets"], *others]))
    (root / "queries.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    small = retrieve(replace(config, top=1)).metrics
    large = retrieve(replace(config, top=20)).metrics
    for k in (1, 2, 3):
        assert small["hits"][f"Rsubset@{k}"] == large["hits"][f"Rsubset@{k}"]
    assert "R@5" not in small["metrics"]
    ranked = {}
    for query, rank, candidate, _ in brute_force(replace(config, top=20)):
        ranked.setdefault(query, {})[candidate] = rank
    hits = 0
    for line in lines:
        members = sorted(set(line["group"]) & set(ranked[line["id"]]), key=ranked[line["id"]].get)
        hits += members[0] == line["targets"][0]
    assert large["hits"]["Rsubset@1"] == hits


def test_the_configuration_that_ships_is_valid():
    assert load_config(RetrieveConfig, "configs/retrieve_icons.yaml").top == 50
