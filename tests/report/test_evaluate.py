import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dafm_ray.cli import main
from dafm_ray.config import EvaluateConfig
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.lease import writing
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.notes import summary_notes
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

FILES = {
    "metrics.json",
    "table.md",
    "table.csv",
    "table.tex",
    "report.html",
    "ranks.parquet",
    "config.yaml",
    "figures",
    "tables",
    "status.json",
}


@pytest.fixture
def store(tmp_path):
    return score_store(tmp_path / "test", labelled_dataset(40, 30, split="test"), signal=1.5)


@pytest.fixture
def config(store, tmp_path):
    other = labelled_dataset(40, 30, seed=9, split="val")
    tune_on = score_store(tmp_path / "val", other, seed=9, signal=1.5)
    return EvaluateConfig(store=store.uri, out=str(tmp_path / "out"), tune_on=tune_on.uri)


def metrics(config):
    evaluate(config)
    return json.loads(Path(config.out, "metrics.json").read_text(encoding="utf-8"))


def test_everything_is_written(config, tmp_path):
    evaluate(config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["stage"], status["done"], status["total"]) == ("evaluate", 30, 30)


def test_a_second_job_with_the_same_output_is_refused(store, tmp_path, capsys):
    out = str(tmp_path / "out")
    with writing(open_storage(out)):
        assert main(["evaluate", store.uri, "--out", out]) == 5
    assert "another run is writing" in capsys.readouterr().err


def test_metrics_agree_with_themselves_and_with_the_ranks(config, tmp_path):
    found = metrics(config)
    ranks = pq.read_table(tmp_path / "out" / "ranks.parquet").to_pylist()
    assert {system["kind"] for system in found["systems"]} == {"single", "static", "oracle"}
    systems = [system for system in found["systems"] if system["kind"] != "oracle"]
    assert len(ranks) == 30 * len(systems)
    for system in systems:
        mine = [row["rank"] for row in ranks if row["system"] == system["name"]]
        assert system["hits"]["R@5"] == sum(rank <= 5 for rank in mine)
        assert system["metrics"]["R@5"] == pytest.approx(100 * system["hits"]["R@5"] / 30, abs=1e-3)
        mean = (system["metrics"]["R@5"] + system["metrics"]["Rsubset@1"]) / 2
        assert system["metrics"]["Rmean"] == pytest.approx(mean, abs=1e-3)
        low, high = system["ci95"]["R@5"]
        assert low <= system["metrics"]["R@5"] <= high
        for luck in ("hits_best", "hits_worst", "hits_expected"):
            assert system[luck].keys() == system["hits"].keys()
        for versus in system["vs"].values():
            assert versus["win"] + versus["tie"] + versus["loss"] == 30
        for judge, metrics_of in system["paired"].items():
            assert metrics_of["R@10"] == system["vs"][judge]
            assert all(one["p"] <= one["p_holm"] <= 1 for one in metrics_of.values())


def test_every_system_is_compared_with_best_single_baselines_and_best_static(config):
    systems = {system["name"]: system for system in metrics(config)["systems"]}
    singles = [s for s in systems.values() if s["kind"] == "single"]
    best = max(singles, key=lambda s: s["metrics"]["R@10"])["name"]
    static = [s for s in systems.values() if s["kind"] == "static"]
    best_static = max(static, key=lambda s: s["metrics"]["R@10"])["name"]
    judges = {best, "mean@zscore", "convex@zscore", best_static}
    assert set(systems["rrf"]["vs"]) == judges - {"rrf"}
    assert best not in systems[best]["vs"]


def test_the_same_job_gives_the_same_files(config, tmp_path):
    other = replace(config, out=str(tmp_path / "again"))
    evaluate(config)
    evaluate(other)
    for file in sorted(path for path in Path(config.out).rglob("*") if path.is_file()):
        if file.name not in ("config.yaml", "status.json"):
            again = Path(other.out) / file.relative_to(config.out)
            assert again.read_bytes() == file.read_bytes(), file


def test_hits_do_not_depend_on_the_tiles(config, tmp_path):
    dataset = labelled_dataset(40, 30, split="test")
    other = score_store(tmp_path / "b", dataset, grid=Grid(4, 30, 40), signal=1.5)
    one = metrics(config)
    two = metrics(replace(config, store=other.uri, out=str(tmp_path / "out2")))
    assert one["systems"] == two["systems"]


def test_the_table_is_the_same_in_every_form(config, tmp_path):
    table = evaluate(config).table
    markdown, text, latex = (
        (tmp_path / "out" / name).read_text() for name in ("table.md", "table.csv", "table.tex")
    )
    for row in table.rows:
        shown = f"{row.metrics['R@10']:.2f}"
        marks = table.marks(row, "R@10")
        assert f" {shown}{marks} |" in next(
            line for line in markdown.splitlines() if f"| {row.name} " in line
        )
        assert f",{shown}," in next(
            line for line in text.splitlines() if line.startswith(f"{row.name},")
        )
    assert latex.count(r"\\") == len(table.rows) + 1
    assert "protocol cirr, reference masked, 30 queries, gallery of 40 images" in markdown


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_escaped(tmp_path):
    dataset = labelled_dataset(12, 6, split="test")
    hostile = "<script>alert(1)</script>"
    queries = tuple(replace(query, captions=(hostile,)) for query in dataset.queries)
    store = score_store(tmp_path / "s", replace(dataset, queries=queries))
    report = evaluate(EvaluateConfig(store=store.uri, out=str(tmp_path / "out"))).report
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert "&lt;script&gt;" in text
    links = [a[key] for _, a in page.attributes for key in ("src", "href") if key in a]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert {link[1:] for link in links if link[0] == "#"} <= {
        a.get("id") for _, a in page.attributes
    }
    assert page.tags.count("h1") == 1


def test_pictures_are_shown_where_the_data_set_is_at_hand(tmp_path):
    from tests.samples import icon_store

    store = icon_store(tmp_path / "s")
    report = evaluate(EvaluateConfig(store=store.uri, out=str(tmp_path / "out"), cases=3)).report
    page = Page(report.read_text(encoding="utf-8"))
    every = [attributes for tag, attributes in page.attributes if tag == "img"]
    images = [image for image in every if "thumb" in image.get("class", "")]
    assert len(images) == 3 * (2 + 5 * (2 + 6))
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in images)
    assert sum("(target)" in image["alt"] for image in images) >= 3


def test_queries_without_targets_are_not_counted(store, config, tmp_path):
    dataset = labelled_dataset(40, 30, split="test")
    half = tuple(replace(q, targets=()) if n % 2 else q for n, q in enumerate(dataset.queries))
    entries = store.manifest.models
    other = type(store).create(
        str(tmp_path / "half"),
        replace(dataset, queries=half),
        {"name": "x", "split": ""},
        entries,
        store.manifest.grid,
        "float32",
    )
    for name in store.models:
        for key in store.score_keys(name):
            other.write(key, store.read(key))
    found = metrics(replace(config, store=other.uri))
    assert found["queries"] == 15
    ranks = pq.read_table(tmp_path / "out" / "ranks.parquet").to_pylist()
    first = found["systems"][0]
    mine = [row["rank"] for row in ranks if row["system"] == first["name"]]
    assert first["metrics"]["R@5"] == pytest.approx(
        100 * sum(rank is not None and rank <= 5 for rank in mine) / 15, abs=1e-3
    )
    assert "15 more have no target" in (tmp_path / "out" / "table.md").read_text()


def test_two_systems_of_one_name_are_refused(config):
    with pytest.raises(ConfigError, match="two systems are called 'mean@zscore'"):
        evaluate(replace(config, fusions=("mean", "mean@zscore")))


@pytest.mark.parametrize("name", ["men@zscore", "convex"])
def test_unknown_fusions(config, name):
    with pytest.raises(ConfigError, match="there is no fusion"):
        evaluate(replace(config, fusions=(name,)))


def test_an_incomplete_store_is_refused(config, store):
    [record, *_] = store.storage.list("records/scores")
    store.storage.delete(record)
    with pytest.raises(DataError, match="lacks 1 tiles"):
        evaluate(config)


def test_weights_are_not_searched_on_the_queries_they_are_reported_on(config):
    with pytest.raises(DataError, match="would be a leak"):
        evaluate(replace(config, tune_on=config.store))


def test_some_of_the_models_are_fused_as_if_there_were_no_others(config):
    whole = metrics(config)
    names = [system["name"] for system in whole["systems"] if system["kind"] == "single"]
    part = metrics(replace(config, models=(names[0],)))
    assert [s["name"] for s in part["systems"] if s["kind"] == "single"] == names[:1]
    numbers = [{s["name"]: s["metrics"] for s in of["systems"]} for of in (whole, part)]
    for name in names[:1]:
        assert numbers[0][name] == numbers[1][name]
    assert numbers[0]["mean@zscore"] != numbers[1]["mean@zscore"]
    with pytest.raises(ConfigError, match="does not hold 'clip'; it holds"):
        evaluate(replace(config, models=("clip",)))


def test_weights_are_not_searched_on_other_models(config, tmp_path):
    dataset = labelled_dataset(9, 4, split="val")
    other = score_store(tmp_path / "c", dataset, models=("a", "c"))
    with pytest.raises(DataError, match="only the same models can be searched"):
        evaluate(replace(config, tune_on=other.uri))


def test_queries_without_targets_cannot_be_counted(tmp_path):
    dataset = labelled_dataset(9, 4)
    store = score_store(tmp_path / "s", dataset)
    bare = replace(dataset, queries=tuple(replace(q, targets=()) for q in dataset.queries))
    entries = store.manifest.models
    empty = type(store).create(str(tmp_path / "e"), bare, {}, entries, Grid(4, 5, 7), "float32")
    for name in store.models:
        for key in store.score_keys(name):
            empty.write(key, store.read(key))
    with pytest.raises(DataError, match="no query has a target"):
        evaluate(EvaluateConfig(store=empty.uri, out=str(tmp_path / "out")))


def test_a_learned_fusion_is_judged_by_the_best_static_one_shown(tmp_path):
    store = score_store(tmp_path / "s", labelled_dataset(60, 90), ("a", "b"), signal=1.5)
    shown = ("mean@zscore", "borda", "combmnz@minmax", "mean@zscore+bank:0.3")
    page = evaluate(
        EvaluateConfig(store=store.uri, out=str(tmp_path / "r"), fusions=shown, cases=0)
    )
    static = [row for row in page.table.rows if row.kind == "static"]
    best = max(static, key=lambda row: row.metrics["R@10"])
    learned = replace(
        next(row for row in page.table.rows if row.name == "a"), name="net", kind="learned"
    )
    assert best.name in learned.vs
    low, high = learned.vs[best.name].ci95
    said = summary_notes(replace(page.table, rows=(*page.table.rows, learned)))
    [said] = [note for note in said if note.startswith("Learning")]
    assert f"against {best.name}" in said
    assert ("does harm" in said) == (high < 0)
    assert ("pays:" in said) == (low > 0)
