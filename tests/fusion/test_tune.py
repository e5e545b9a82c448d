import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dafm_ray.cli import main
from dafm_ray.config import Between, FusionConfig, StudyConfig, load_config, to_yaml
from dafm_ray.errors import ConfigError, MachineError
from dafm_ray.fusion import tune
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.study import name_of, settings_of
from dafm_ray.fusion.trial import RECORD, TRIALS, VALUES, Trial, run_trial
from dafm_ray.fusion.tune import ASKED, SCORES, Studied, run_study
from dafm_ray.report.choice import choose_static
from dafm_ray.report.study import report_study
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

pytestmark = pytest.mark.timeout(170)

MODELS = ("a", "b", "c")
FUSED = {"recipe": {"epochs": 2, "batch": 32}, "network": {"width": 4}, "cases": 0}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    dataset = labelled_dataset(60, 90)
    return score_store(tmp_path_factory.mktemp("s") / "store", dataset, MODELS, Grid(64, 45, 60))


def study_of(root, store, **change):
    given = {
        "kind": "networks",
        "fusion": {"store": store.uri, **FUSED},
        "out": str(root / "study"),
        "spaces": ({"recipe.learning_rate": (0.03, 0.003), "network.gate": (False, True)},),
        "cpus": 4.0,  # all of them: the workers' start takes longer than these trials
    }
    return StudyConfig(**{**given, **change})


@pytest.mark.usefixtures("local_ray")
def test_a_study_is_tried_once_chosen_from_and_reported(tmp_path, store, capsys):
    failing = {"recipe.temperature": ("paper",), "recipe.scaling": (0.5,)}
    study = study_of(tmp_path, store)
    study = replace(study, spaces=(*study.spaces, failing))
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(study))
    assert main(["fuse", "tune", "--config", str(file)]) == 4
    shown = capsys.readouterr()
    assert "1 of 6 trials failed" in shown.out
    assert "trials.csv" in shown.err
    out = tmp_path / "study"
    assert len(list((out / TRIALS).iterdir())) == 6
    status = json.loads((out / "status.json").read_text())
    assert [status[key] for key in ("stage", "done", "total", "failures")] == ["trials", 6, 6, 1]
    records = {path: path.stat().st_mtime_ns for path in out.rglob(RECORD)}
    again = report_study(study)
    assert {path: path.stat().st_mtime_ns for path in out.rglob(RECORD)} == records
    assert again.failures == 1
    chosen = load_config(FusionConfig, out / "chosen.yaml")
    assert chosen.out == str(out / "fusion")
    found = [json.loads(path.read_text()) for path in records]
    best = max(found, key=lambda record: record["score"])
    learning_rate = best["setting"].get("recipe.learning_rate", 0.01)
    if sum(record["score"] == best["score"] for record in found) == 1:
        assert chosen.recipe.learning_rate == learning_rate
    page = (out / "report.html").read_text()
    assert "is not below the scaling factor" in page
    assert page.count("data:image/svg+xml") >= 3
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["queries"] < 90
    assert "others are left out" in metrics["caption"]


@pytest.mark.usefixtures("local_ray")
def test_subsets_orders_and_what_each_model_adds(tmp_path, store):
    report = report_study(study_of(tmp_path, store, kind="orders", spaces=(), metric="Rmean"))
    out = Path(report.out)
    rows = (out / "orders.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 * 3
    assert sum(not row.endswith(",") for row in rows[1:]) == 2 * 3
    assert len((out / "subsets.csv").read_text().splitlines()) == 1 + 7
    models = (out / "models.csv").read_text().splitlines()
    shapley = sum(float(row.split(",")[3]) for row in models[1:])
    whole = float(rows[3].split(",")[2])
    chance = whole - shapley
    assert 5 < chance < 25  # Rmean is half the recall within a group of five
    page = (out / "report.html").read_text()
    assert "Not ours." in page
    assert "What each model adds" in page


@pytest.mark.usefixtures("local_ray")
def test_static_settings_are_chosen_out_of_fold(tmp_path, store):
    spaces = ({"system": ("rrf",), "k": (5, 60)}, {"system": ("borda", "mean@dbsf")})
    report = report_study(study_of(tmp_path, store, kind="static", spaces=spaces))
    assert "Chosen for each fold by the others" in report.notes[1]
    assert yaml.safe_load((Path(report.out) / "chosen.yaml").read_text())["system"]


@pytest.mark.usefixtures("local_ray")
def test_optuna_goes_on_from_what_was_tried(tmp_path, store):
    space = {"recipe.learning_rate": Between(1e-3, 1e-1, log=True), "network.gate": (False, True)}
    study = study_of(tmp_path, store, spaces=(space,), search="optuna", trials=2)
    first = run_study(study)
    assert len(first.trials) == 1 + 2
    assert run_study(study) == first
    lost = first.trials[-1]
    (Path(study.out) / TRIALS / lost.name / RECORD).unlink()
    (Path(study.out) / ASKED).unlink()
    assert len(run_study(study).trials) == 1 + 2


@pytest.mark.usefixtures("local_ray")
def test_settings_that_are_behind_are_given_up_and_not_tried_again(tmp_path, store):
    rates = (1e-3, 2e-3, 3e-3, 5.0, 6.0, 7.0)
    fusion = {"store": store.uri, **FUSED, "recipe": {"epochs": 4, "batch": 32}}
    spaces = ({"recipe.learning_rate": rates, "recipe.epochs": (6,)},)
    study = study_of(tmp_path, store, fusion=fusion, spaces=spaces, stop_early=True)
    study = replace(study, baseline={"recipe.learning_rate": 8.0})
    first = run_study(study)
    assert len(first.trials) == 7
    assert any(trial.stopped for trial in first.trials)
    assert all(trial.seconds > 0 for trial in first.trials)
    assert not first.usable[0].stopped  # it had all of its epochs, which are more than the base's
    assert not first.baseline.stopped
    assert not any(trial.failure for trial in first.trials)
    assert run_study(study) == first


@pytest.mark.usefixtures("local_ray")
def test_a_killed_study_goes_on_and_ends_as_an_unbroken_one(tmp_path, store):
    rates = tuple(0.001 * n for n in range(1, 9))
    spaces = ({"recipe.learning_rate": rates},)
    study = study_of(tmp_path / "killed", store, spaces=spaces, cpus=2.0)
    storage = open_storage(str(tmp_path / "bare"))
    unbroken = [run_trial(study, setting, storage) for setting in settings_of(study, MODELS, "a")]
    file = tmp_path / "study.yaml"
    file.write_text(to_yaml(study))
    process = subprocess.Popen(
        [sys.executable, "-m", "dafm_ray", "fuse", "tune", "--config", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    trials = Path(study.out) / TRIALS
    while len(list(trials.rglob(RECORD))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in trials.rglob(RECORD)}
    assert 2 <= len(kept) < 9
    ended = run_study(study)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = [(trial.name, trial.metrics) for trial in ended.trials]
    assert found == [(trial.name, trial.metrics) for trial in unbroken]
    assert ended.usable[0].name == max(unbroken, key=lambda trial: trial.score).name


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_study_on_s3_is_the_study_on_disk(tmp_path, store, bucket):
    local = study_of(tmp_path, store, kind="static", spaces=({"system": ("rrf",), "k": (5, 60)},))
    uri = bucket.replace("s3://", "s3://testing:testing@") + "&region=us-east-1"
    report = report_study(replace(local, out=uri))
    found = open_storage(uri)
    assert {"report.html", "trials.parquet", "chosen.yaml"} <= set(found.list(""))
    assert report.notes == report_study(local).notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "R@7"}, "there is no metric 'R@7'"),
        ({"first": "z", "kind": "orders", "spaces": ()}, "there is no model 'z'"),
        ({"spaces": ({"models": (("a", "z"),)},)}, "there is no model 'z'"),
        ({"spaces": ({"recipe.scalng": (1.0,)},)}, "did you mean 'scaling'"),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_tried(tmp_path, store, change, message):
    study = study_of(tmp_path, store, **change)
    with pytest.raises(ConfigError, match=message):
        run_study(study)
    assert not (tmp_path / "study").exists()


def test_trials_without_a_record_are_said(tmp_path, store, monkeypatch):
    monkeypatch.setattr(tune, "_try", lambda *_: None)
    with pytest.raises(MachineError, match="5 of 5 trials have no record"):
        run_study(study_of(tmp_path, store))


def test_trials_of_other_scores_are_not_taken_for_these(tmp_path, store):
    study = study_of(tmp_path, store, kind="static", spaces=({"system": ("rrf",)},))
    storage = open_storage(study.out)
    for setting in settings_of(study, MODELS, "a"):
        run_trial(study, setting, storage)
    storage.write("config.yaml", pa.py_buffer(to_yaml(study).encode()))
    storage.write(SCORES, pa.py_buffer(b"others"))
    with pytest.raises(ConfigError, match="trials of other scores"):
        run_study(study)


def test_of_equal_static_settings_the_first_is_chosen_whatever_the_fold_says(tmp_path, store):
    """Settings that differ in one fold alone: its own labels must not choose for it."""
    spaces = ({"system": ("rrf",), "k": (5, 6, 7)},)
    study = study_of(tmp_path, store, kind="static", spaces=spaces)
    storage = open_storage(study.out)
    queries = store.queries
    fold_of_Q = grouped_folds(queries, study.base.folds, study.base.seed)
    trials = []
    for n, setting in enumerate(settings_of(study, MODELS, "a")):
        values = np.where(fold_of_Q == n, 1.0, 0.0)
        trial = Trial(name_of(setting), setting, 100 * float(values.mean()))
        table = pa.table({study.metric: values})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        storage.write(f"{TRIALS}/{trial.name}/{VALUES}", sink.getvalue())
        trials.append(trial)
    # Seen from fold n all settings but n tie at some hits of another fold.
    found = choose_static(Studied(study, tuple(trials), {}, "a"), storage, tmp_path)
    backwards = choose_static(
        Studied(study, tuple(replace(t, score=-t.score) for t in trials), {}, "a"),
        storage,
        tmp_path,
    )
    assert found.notes[1] == backwards.notes[1]


def test_another_study_in_the_same_folder_is_refused(tmp_path, store):
    study = study_of(tmp_path, store, kind="static", spaces=({"system": ("rrf",)},))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.yaml").write_text(to_yaml(replace(study, seed=3)))
    with pytest.raises(ConfigError, match="seed differ"):
        run_study(study)
