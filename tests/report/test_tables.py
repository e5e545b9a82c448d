from dataclasses import replace

import pytest

from dafm_ray.config import EvaluateConfig
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.published import published_for
from dafm_ray.report.tables import MARKS, latex, to_csv, to_latex, to_markdown
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    dataset = replace(labelled_dataset(200, 300), name="cirr")
    store = score_store(root / "s", dataset, ("a", "b", "c"), Grid(64, 300, 200), signal=2.0)
    return evaluate(EvaluateConfig(store=store.uri, out=str(root / "out"), cases=0))


def test_published_rows_stand_apart_and_are_never_ours(page):
    table = page.table
    assert table.published is not None
    assert {"SPRC+SPN", "CCIN", "DAFM"} <= set(table.published.rows)
    assert not set(table.published.rows) & {row.name for row in table.rows}
    assert "CCIN" not in to_csv(table)
    markdown = to_markdown(table)
    assert (
        markdown.index("| mean@zscore ")
        < markdown.index("Published, CIRR test1")
        < markdown.index("| CCIN")
    )
    assert to_latex(table).index(r"\midrule") < to_latex(table).index("SPRC+SPN")


def test_other_data_has_no_published_rows(page, tmp_path):
    store = score_store(tmp_path / "s", labelled_dataset(20, 9))
    assert published_for([store.manifest], page.table.metrics) is None


def test_marks_are_of_significant_gains_alone(page):
    table = page.table
    marked = 0
    for row in table.systems:
        for metric in table.metrics:
            for judge, mark in zip((table.single, table.static), MARKS, strict=True):
                shown = mark in table.marks(row, metric)
                paired = row.paired.get(judge, {}).get(metric)
                assert shown == bool(paired and paired.p_holm < 0.05 and paired.diff > 0)
                marked += shown
    assert marked
    assert not any(table.marks(row, "R@10") for row in table.oracles)


def test_an_oracle_is_never_the_best_system(page):
    table = page.table
    oracle, control = table.oracles
    assert oracle.metrics["R@10"] >= table.top.metrics["R@10"] - 5
    assert table.top.kind != "oracle"
    assert not any(table.is_best(oracle, metric) for metric in table.metrics)
    assert control.metrics["R@10"] < oracle.metrics["R@10"] + 5
    assert not oracle.paired


def test_intervals_stand_in_the_csv(page):
    header, first, *_ = to_csv(page.table).splitlines()
    places = header.split(",")
    row, cells = page.table.rows[0], first.split(",")
    assert cells[places.index("R@10 low")] == f"{row.ci95['R@10'][0]:.2f}"
    assert cells[places.index("R@10 high")] == f"{row.ci95['R@10'][1]:.2f}"


def test_latex_is_escaped():
    assert latex("a_b & 5 % {x} #1 $") == r"a\_b \& 5 \% \{x\} \#1 \$"
    assert latex("p < 0.05 †") == r"p $<$ 0.05 $\dagger$"
    assert latex("a\\b") == r"a\textbackslash b"


def test_published_rows_say_when_the_data_is_another_one_in_the_same_layout(page, tmp_path):
    assert "do not compare" in page.table.published.note
    like = score_store(tmp_path / "s", replace(labelled_dataset(20, 9), name="cirr")).manifest
    val = replace(
        like,
        dataset={"name": "cirr", "split": "val", "category": ""},
        gallery_size=2_297,
        queries_size=4_181,
    )
    assert "do not compare" not in published_for([val], page.table.metrics).note
    assert "do not compare" in published_for([val, like], page.table.metrics).note


def test_published_figures_as_the_papers_print_them(page):
    rows = page.table.published.rows
    assert rows["DAFM"]["Rmean"] == 84.43
    assert rows["SPRC+SPN"]["Rsubset@1"] == 81.54
    assert "Rmean" not in rows["CCIN"]
    for name, row in rows.items():
        if "Rmean" in row:
            mean = (row["R@5"] + row["Rsubset@1"]) / 2
            assert row["Rmean"] == pytest.approx(mean, abs=0.011), name
