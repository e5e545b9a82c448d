import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dafm_ray.config import EvaluateConfig, load_config
from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.significance import Resampling
from dafm_ray.report.evaluate import evaluate
from tests.samples import labelled_dataset, matrix_store, score_matrix

SIGNALS = {"base": 1.0, "tuned": 2.0, "spoilt": 0.5, "noise": 0.0, "reversed": -3.0}
STARTS = {"tuned": "base", "spoilt": "base", "noise": "noise2"}
COLUMNS = ("R@10", "R@1", "R@50")


def dataset(candidates=80, queries=400):
    """Every third query has two targets, every fifth lacks one more candidate."""
    made = labelled_dataset(candidates, queries)
    changed = []
    for n, query in enumerate(made.queries):
        _, target, other, gone, *_ = query.group
        targets = (target, other) if n % 3 == 0 else (target,)
        excluded = (*query.excluded, gone) if n % 5 == 0 else query.excluded
        changed.append(replace(query, targets=targets, excluded=excluded))
    return replace(made, queries=tuple(changed))


def matrices(data, signals=SIGNALS):
    found = {
        name: score_matrix(data, seed, signal)
        for seed, (name, signal) in enumerate(signals.items())
    }
    return found | {"noise2": score_matrix(data, 99, 0.0)}


def job(root, data, scores, **other):
    store = matrix_store(root / "s", data, {f"test:{n}@random": m for n, m in scores.items()})
    return EvaluateConfig(store.uri, str(root / "out"), ("mean@zscore",), cases=0, **other)


def metrics(config):
    return json.loads(Path(config.out, "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    data = dataset()
    scores = matrices(data)
    config = job(tmp_path_factory.mktemp("starts"), data, scores, starts=STARTS)
    return data, scores, config, evaluate(config)


def hits(data, scores_QN, k):
    """Sorted, one query after the other."""
    found = []
    for query, scores_N in zip(data.queries, scores_QN, strict=True):
        ranked = sorted(
            (id for id in data.gallery.ids if id not in query.excluded),
            key=lambda id: -scores_N[data.gallery.position(id)],
        )
        found.append(float(bool(set(ranked[:k]) & set(query.targets))))
    return np.array(found)


def chance(query, candidates, k):
    """One candidate after the other is drawn."""
    left, missed = candidates - len(query.excluded), 1.0
    for _ in range(k):
        missed *= max(left - len(query.targets), 0) / left
        left -= 1
    return 1 - missed


def test_the_numbers_are_those_of_a_plain_computation(done):
    data, scores, config, _ = done
    found = metrics(config)
    systems = {system["name"]: system for system in found["systems"]}
    resampling = Resampling([query.fold_group for query in data.queries])
    for column in COLUMNS:
        k = int(column[2:])
        chance_Q = np.array([chance(query, 80, k) for query in data.queries])
        assert found["chance"][column] == pytest.approx(100 * chance_Q.mean())
        hits_Q = {name: hits(data, own, k) for name, own in scores.items()}
        for name, own_Q in hits_Q.items():
            judged = {"chance": (systems[name]["chance"][column], chance_Q)}
            if name in STARTS:
                start = systems[name]["start"]
                assert start["name"] == STARTS[name]
                judged["start"] = start["metrics"][column], hits_Q[STARTS[name]]
            else:
                assert systems[name]["start"] is None
            for paired, other_Q in judged.values():
                difference_Q = own_Q - other_Q
                assert paired["diff"] == pytest.approx(100 * difference_Q.mean(), abs=1e-3)
                low, high = resampling.interval(difference_Q)
                assert paired["ci95"] == pytest.approx([low, high], abs=1e-3)
                counts = [(difference_Q > 0).sum(), (difference_Q < 0).sum()]
                assert [paired["win"], paired["loss"]] == counts
                assert paired["p"] <= paired["p_holm"] <= 1
    assert "chance" not in systems["mean@zscore"]
    assert set(systems["base"]["chance"]) == set(COLUMNS)


def test_the_correction_is_over_the_whole_table(done):
    found = [
        paired
        for system in metrics(done[2])["systems"]
        if "chance" in system
        for part in (system["chance"], (system["start"] or {"metrics": {}})["metrics"])
        for paired in part.values()
    ]
    assert len(found) == 3 * (6 + 3)
    least = min(found, key=lambda paired: paired["p"])
    assert least["p_holm"] == pytest.approx(len(found) * least["p"])


def test_what_is_told_from_chance_is_said(done):
    notes = {note.split()[0]: note for note in done[3].notes if "chance at R@10" in note}
    assert set(notes) == {"noise", "noise2", "reversed"}
    assert notes["noise"].startswith("noise cannot be told from chance at R@10: ")
    assert notes["reversed"].startswith("reversed is below chance at R@10: -")
    assert " hits where a random order has " in notes["reversed"]


def test_what_is_told_from_a_start_is_said(done):
    notes = [note for note in done[3].notes if " its start " in note]
    assert [note.split(":")[0] for note in notes] == [
        "noise cannot be told from its start noise2 at R@10",
        "spoilt is below its start base at R@10",
        "tuned is above its start base at R@10",
    ]


def test_models_that_are_all_above_chance_are_said_to_be(tmp_path):
    data = labelled_dataset(60, 200)
    scores = {name: score_matrix(data, seed, 2.0) for seed, name in enumerate("ab")}
    config = job(tmp_path, data, scores, chance=True)
    said = [note for note in evaluate(config).notes if "chance" in note]
    assert "Every single model is above chance at R@10 (16.95 %)." in said
    text = Path(config.out, "tables", "against_chance.csv").read_text()
    assert text.splitlines()[0].startswith("model,metric,recall,chance,difference to chance,")
    assert not Path(config.out, "tables", "against_chance_and_its_start.csv").exists()
    assert metrics(config)["systems"][0]["start"] is None


def test_the_section_is_a_table_and_a_file(done):
    _, _, config, evaluation = done
    page = evaluation.report.read_text(encoding="utf-8")
    assert "Against chance and its start</h2>" in page
    folder = Path(config.out, "tables")
    assert r"\toprule" in (folder / "against_chance_and_its_start.tex").read_text()
    with (folder / "against_chance_and_its_start.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["metric"] for row in rows] == [c for c in COLUMNS for _ in range(6)]
    row = next(row for row in rows if (row["model"], row["metric"]) == ("tuned", "R@10"))
    system = next(s for s in metrics(config)["systems"] if s["name"] == "tuned")
    assert row["start"] == "base"
    assert float(row["recall"]) == pytest.approx(system["metrics"]["R@10"], abs=0.006)
    for title, paired in (
        ("chance", system["chance"]["R@10"]),
        ("its start", system["start"]["metrics"]["R@10"]),
    ):
        found = [float(row[f"difference to {title}{end}"]) for end in ("", " low", " high")]
        assert found == pytest.approx([paired["diff"], *paired["ci95"]], abs=0.006)
        assert row[f"difference to {title} significant"] == "true"
    assert row["win/tie/loss"].count("/") == 2
    alone = next(row for row in rows if row["model"] == "base")
    assert (alone["start"], alone["difference to its start"], alone["win/tie/loss"]) == (
        "-",
        "",
        "-",
    )


def test_what_is_not_asked_for_is_not_there(done, tmp_path):
    config = replace(done[2], starts={}, out=str(tmp_path / "out"))
    evaluation = evaluate(config)
    assert not any("chance at" in note for note in evaluation.notes)
    assert not list(Path(config.out, "tables").glob("against*"))
    found = metrics(config)
    assert found["chance"] is None
    assert not any("chance" in system or "start" in system for system in found["systems"])


def test_random_rankings_hold_chance_in_their_intervals(tmp_path):
    data = dataset(60, 300)
    scores = {f"m{seed:02}": score_matrix(data, seed, 0.0) for seed in range(20)}
    config = job(tmp_path, data, scores, chance=True)
    evaluation = evaluate(config)
    systems = [s for s in metrics(config)["systems"] if s["kind"] == "single"]
    bounds = [system["chance"]["R@10"]["ci95"] for system in systems]
    assert sum(low <= 0 <= high for low, high in bounds) >= 18
    assert not any(s["chance"][c]["p_holm"] < 0.05 for s in systems for c in COLUMNS)
    assert sum("cannot be told from chance" in note for note in evaluation.notes) >= 18


def test_no_hit_where_hardly_one_is_due_is_not_below_chance(tmp_path):
    data = labelled_dataset(3000, 40)
    config = job(tmp_path, data, {"a": score_matrix(data, 0, -9.0)}, chance=True)
    [note] = [note for note in evaluate(config).notes if "chance" in note]
    assert note.startswith("a cannot be told from chance at R@10: -0.33 points")
    assert note.endswith("0 hits where a random order has 0.1.")
    system = metrics(config)["systems"][0]
    assert all(paired["p_holm"] > 0.05 for paired in system["chance"].values())


def test_each_category_has_chance_of_its_own_gallery(tmp_path):
    stores = []
    for seed, (category, candidates, queries) in enumerate([("dress", 40, 30), ("shirt", 90, 70)]):
        data = labelled_dataset(candidates, queries, seed=seed, policy="keep")
        named = tuple(
            replace(query, id=f"{category}-{query.id}", category=category) for query in data.queries
        )
        data = replace(data, queries=named, protocol="fashioniq", category=category)
        scores = {f"test:{name}@random": score_matrix(data, n) for n, name in enumerate("ab")}
        stores.append(matrix_store(tmp_path / category, data, scores).uri)
    config = EvaluateConfig(tuple(stores), str(tmp_path / "out"), (), cases=0, starts={"b": "a"})
    evaluate(config)
    found = metrics(config)
    mean = {f"R@{k}": 100 * (min(k / 40, 1) + k / 90) / 2 for k in (10, 50)}
    assert found["chance"] == pytest.approx(mean)
    for system in found["systems"]:
        if system["kind"] == "single":
            for column, percent in mean.items():
                difference = system["metrics"][column] - percent
                assert system["chance"][column]["diff"] == pytest.approx(difference, abs=2e-3)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({"tuend": "base"}, "no model of the store 'tuend'; did you mean 'tuned'"),
        ({"tuned": "bse"}, "no model of the store 'bse'; did you mean 'base'"),
    ],
)
def test_unknown_models_are_named(done, tmp_path, starts, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(replace(done[2], starts=starts, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("starts", [{"a": "a"}, {"a": "b", "b": "a"}, {"c": "a", "a": "a"}])
def test_no_model_is_its_own_start(starts):
    with pytest.raises(ConfigError, match="'a' is its own start"):
        EvaluateConfig("s", "o", starts=starts)


def test_starts_stand_in_a_file_of_the_job(tmp_path):
    file = tmp_path / "evaluate.yaml"
    file.write_text("store: a\nout: d\nstarts: {tuned: base}\n")
    assert load_config(EvaluateConfig, file).starts == {"tuned": "base"}
    assert load_config(EvaluateConfig, file, ["starts.other=base"]).starts == {
        "tuned": "base",
        "other": "base",
    }
