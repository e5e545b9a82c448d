import csv
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dafm_ray.config import EvaluateConfig
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.significance import Resampling
from dafm_ray.evaluation.summary import Summary
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.findings import Section
from dafm_ray.report.ranked import rank_all
from dafm_ray.report.results import result_table
from dafm_ray.report.sections import breakdown, contributions
from tests.samples import labelled_dataset, matrix_store, score_matrix, score_store


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A strong model, a weak one and one that is noise; dresses have short texts."""
    root = tmp_path_factory.mktemp("sections")
    dataset = labelled_dataset(80, 300)
    queries = tuple(
        replace(
            query,
            category="dress" if n % 3 else "shirt",
            captions=("red " * (2 + 3 * (n % 3 == 0) + n % 2),),
        )
        for n, query in enumerate(dataset.queries)
    )
    dataset = replace(dataset, queries=queries)
    matrices = {
        f"test:{name}@random": score_matrix(dataset, seed, signal)
        for seed, (name, signal) in enumerate({"strong": 2.5, "weak": 1.5, "noise": 0.0}.items())
    }
    store = matrix_store(root / "s", dataset, matrices)
    config = EvaluateConfig(store.uri, str(root / "out"), ("mean@zscore",), cases=0)
    ranked = rank_all([store], config)
    categories = [query.category for query in store.queries]

    def summary(ranks):
        return Summary(ranks, protocol("cirr"), categories)

    summaries = {system.name: summary(system) for system in ranked.systems}
    resampling = Resampling([query.fold_group for query in store.queries])
    table = result_table([store], store.queries, list(summaries.values()), resampling)
    ablations = [(one, summary(ranks)) for one, ranks in ranked.ablations]
    return store, table, summaries, ablations, resampling, evaluate(config)


def test_a_model_that_is_noise_costs_and_a_strong_one_carries(measured):
    _, _, summaries, ablations, resampling, _ = measured
    [section] = contributions(ablations, summaries, resampling)
    found = {row[0]: row for row in section.shown}
    assert {row[1] for row in section.shown} == {"mean@zscore"}
    differences = {model: float(row[3].split()[0]) for model, row in found.items()}
    assert differences["strong"] < differences["weak"] < 0 < differences["noise"]
    assert found["strong"][3].endswith("*")
    whole = summaries["mean@zscore"].percent(HEADLINE)
    for model, row in found.items():
        assert float(row[2]) == pytest.approx(whole + differences[model], abs=0.011)


def test_one_model_has_no_contributions(measured):
    assert contributions([], measured[2], measured[4]) == []


def test_every_category_and_length_has_its_row(measured):
    store, table, summaries, _, resampling, _ = measured
    [section] = breakdown(store.queries, table, summaries, resampling)
    names = [row[0] for row in section.rows]
    assert names[:2] == ["dress", "shirt"]
    assert any("words" in name for name in names[2:])
    counts = [int(row[1]) for row in section.rows]
    assert counts[:2] == [200, 100]
    assert sum(counts[2:]) == 300
    single, best = (summaries[name].values[HEADLINE] for name in (table.single, table.top.name))
    dresses = np.array([query.category == "dress" for query in store.queries])
    row = section.rows[0]
    assert float(row[2]) == pytest.approx(100 * single[dresses].mean(), abs=0.006)
    if table.top.name != table.single:
        assert float(row[3]) == pytest.approx(100 * best[dresses].mean(), abs=0.006)


def test_they_are_files_too(measured):
    folder = measured[-1].report.parent / "tables"
    names = {path.name for path in folder.iterdir()}
    assert {"what_each_model_is_worth.csv", "where_it_helps.tex"} <= names
    with (folder / "what_each_model_is_worth.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["without"] for row in rows] == ["noise", "strong", "weak"]
    _, _, summaries, ablations, resampling, _ = measured
    [section] = contributions(ablations, summaries, resampling)
    for row, (*_, shown) in zip(rows, section.shown, strict=True):
        difference, low, high = (float(row[f"difference{end}"]) for end in ("", " low", " high"))
        star = " *" if row["difference significant"] == "true" else ""
        assert shown == f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]{star}"
    assert r"\toprule" in (folder / "where_it_helps.tex").read_text()


def test_the_columns_of_a_file_do_not_depend_on_what_there_is(tmp_path):
    columns = ("difference", "difference low", "difference high", "difference significant")
    section = Section("T", "", ("what", "difference"), (("a", "-"),), differences=("difference",))
    section.write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [{"what": "a"} | dict.fromkeys(columns, "")]


def test_the_report_shows_them(measured):
    text = measured[-1].report.read_text(encoding="utf-8")
    assert "What each model is worth" in text
    assert "Where it helps" in text


def test_kinds_of_text_have_a_column_and_every_system_a_row(tmp_path):
    texts = ["in red", "with stripes", "longer"]
    dataset = labelled_dataset(40, 120)
    asked = [replace(q, captions=(texts[n % 3],)) for n, q in enumerate(dataset.queries)]
    store = score_store(
        tmp_path / "s", replace(dataset, queries=tuple(asked)), ("a", "b"), signal=1.0
    )
    evaluate(EvaluateConfig(store.uri, str(tmp_path / "out"), ("mean@zscore",), cases=0))
    with (tmp_path / "out" / "tables" / "what_the_text_is_about.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == [
        "system",
        "mention a colour (40)",
        "mention a pattern (40)",
        "other texts (40)",
    ]
    assert [row[0] for row in rows[1:]] == ["a", "b", "mean@zscore"]
    ranks = pq.read_table(tmp_path / "out" / "ranks.parquet").to_pylist()
    red = {query.id for query in asked if query.captions == ("in red",)}
    hits = sum(r["rank"] <= 10 for r in ranks if r["system"] == "a" and r["query"] in red)
    assert rows[1][1] == f"{100 * hits / 40:.2f}"
