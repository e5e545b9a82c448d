"""What a study chooses, and what the choice is worth on queries that did not choose it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dafm_ray.config import EvaluateConfig, to_yaml
from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import stratified_mean
from dafm_ray.evaluation.significance import Resampling
from dafm_ray.fusion.artefact import TRACE, load_artefact
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.study import static_setting
from dafm_ray.fusion.train import open_stores
from dafm_ray.fusion.trial import (
    FUSION,
    TRIALS,
    Trial,
    reporting,
    static_system,
    summaries_of,
    summary_of,
    values_of,
)
from dafm_ray.fusion.tune import Studied
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.figures import Figure, scatter_figure, temperature_figure
from dafm_ray.report.findings import Findings
from dafm_ray.storage import LocalStorage, Storage
from dafm_ray.tiles.store import TileStore

CHOSEN, BASELINE, YAML = "chosen", "baseline", "chosen.yaml"

_WIDE = 30
"""Largest over smallest value from which an axis is logarithmic."""


def choose_network(studied: Studied, storage: Storage, root: Path) -> Findings:
    """The best setting, beside the baseline on queries that decided nothing.

    Writes `chosen.yaml`, the fusions `baseline/` and `chosen/`, and `report/`, their evaluation.

    Args:
        studied: of kind `networks`.
        storage: of the study.
        root: where to write.

    Raises:
        DataError: the baseline came to nothing.
    """
    study, baseline = studied.study, studied.baseline
    if baseline.failure or baseline.stopped:
        raise DataError(f"the baseline came to nothing: {baseline.failure or 'stopped early'}")
    ended = [trial for trial in studied.usable if not trial.stopped]
    chosen, worst = ended[0], ended[-1]
    # A training keeps its checkpoints in a local folder.
    out = f"{storage.root}/fusion" if isinstance(storage, LocalStorage) else "runs/fusion"
    config = replace(study.with_setting(chosen.setting), out=out)
    (root / YAML).write_text(to_yaml(config), encoding="utf-8")
    shown = {BASELINE: baseline} | ({} if chosen is baseline else {CHOSEN: chosen})
    for name, trial in shown.items():
        _fetch(storage, trial, root / name)
    stores = reporting(study, study.base)
    evaluate(
        EvaluateConfig(
            store=tuple(store.uri for store in stores),
            out=str(root / "report"),
            fusions=("mean@zscore", *(str(root / name) for name in shown)),
            cases=study.base.cases,
            seed=study.seed,
        ),
        stores,
    )
    notes = [
        f"Chosen by {study.metric} among {len(ended)} trials: {spoken(chosen)}, "
        f"{chosen.score:.2f} % where it was chosen; the baseline ({spoken(baseline)}) has "
        f"{baseline.score:.2f} %."
    ]
    if chosen is baseline:
        notes.append("No setting is above the baseline, so the baseline is kept.")
    else:
        where = "the validation store" if study.base.validation_stores else "the folds kept back"
        notes.append(f"On {where}, which decided nothing: {_compared(studied, root, stores)}")
    figures = searched_figures(studied)
    figures += _temperatures(storage, {"best": chosen, "baseline": baseline, "worst": worst})
    return Findings(notes, [], figures)


def choose_static(studied: Studied, storage: Storage, root: Path) -> Findings:
    """The best static fusion, and what choosing is worth: for the queries of each fold by the
    others. Writes `chosen.yaml`.
    """
    study, baseline = studied.study, studied.baseline
    # Not the best first: of equal ones the first is taken, which must not depend on all labels.
    trials = [trial for trial in studied.trials if not trial.failure]
    stores = open_stores(study.base)
    labelled = [query for store in stores for query in store.queries if query.targets]
    fold_of_Q = grouped_folds(labelled, study.base.folds, study.base.seed)
    systems = [static_system(store, baseline.setting) for store in stores]
    strata_Q = summary_of(systems, stores).strata
    values_TQ = np.stack([values_of(study, trial, storage) for trial in trials])
    chosen_Q = np.empty(len(labelled))
    picked: dict[str, Trial] = {}
    for fold in range(study.base.folds):
        others = fold_of_Q != fold
        strata = None if strata_Q is None else strata_Q[others]
        means = [stratified_mean(values_Q[others], strata) for values_Q in values_TQ]
        best = int(np.argmax(means))
        picked[trials[best].name] = trials[best]
        chosen_Q[~others] = values_TQ[best][~others]
    difference_Q = chosen_Q - values_of(study, baseline, storage)
    groups = [query.fold_group for query in labelled]
    points = 100 * stratified_mean(difference_Q, strata_Q)
    interval = Resampling(groups, strata_Q, study.seed).interval(difference_Q)
    top = studied.usable[0]
    (root / YAML).write_text(to_yaml(static_setting(top.setting)), encoding="utf-8")
    notes = [
        f"Best of {len(trials)} settings over all queries: {spoken(top)}, "
        f"{study.metric} {top.score:.2f} %; the baseline ({spoken(baseline)}) has "
        f"{baseline.score:.2f} %.",
        f"Chosen for each fold by the others: {100 * stratified_mean(chosen_Q, strata_Q):.2f} %, "
        f"{_verdict(points, interval, study.metric)} "
        f"The folds chose: {'; '.join(map(spoken, picked.values()))}.",
    ]
    return Findings(notes, [], searched_figures(studied))


def spoken(trial: Trial) -> str:
    """A setting in words."""
    said = ", ".join(f"{key} {written(value)}" for key, value in trial.setting.items())
    return said or "nothing changed"


def written(value: Any) -> str:
    """A value of a setting; empty for one that is not set."""
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def searched_figures(studied: Studied) -> list[Figure]:
    """The metric against every key that has three numbers or more."""
    metric, level = studied.study.metric, studied.baseline.score
    figures = []
    for key in studied.keys:
        trials = [trial for trial in studied.usable if key in trial.setting]
        values = [trial.setting[key] for trial in trials]
        if len(set(map(str, values))) < 3 or not all(type(v) in (int, float) for v in values):
            continue
        wide = min(values) > 0 and max(values) > _WIDE * min(values)
        scores = [trial.score for trial in trials]
        figures.append(scatter_figure(values, scores, key, metric, level, wide))
    return figures


def _temperatures(storage: Storage, named: dict[str, Trial]) -> list[Figure]:
    figures = []
    for name, trial in named.items():
        trace = storage.read(f"{TRIALS}/{trial.name}/{FUSION}/{TRACE}").to_pybytes().decode()
        words = f"{name}: {spoken(trial)}, {trial.score:.2f} %: loss and temperature"
        figures.append(temperature_figure(trace, f"temperature_{name}", words))
    return figures


def _fetch(storage: Storage, trial: Trial, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in storage.list(f"{TRIALS}/{trial.name}/{FUSION}"):
        (to / Path(path).name).write_bytes(storage.read(path).to_pybytes())


def _compared(studied: Studied, root: Path, stores: Sequence[TileStore]) -> str:
    """The chosen fusion against the baseline, query by query, in the study's metric."""
    study = studied.study
    artefacts = [load_artefact(root / name) for name in (BASELINE, CHOSEN)]
    made = [[artefact.on(store).learned for artefact in artefacts] for store in stores]
    baseline, chosen = summaries_of(made, stores)
    labelled = [query for store in stores for query in store.queries if query.targets]
    groups = [query.fold_group for query in labelled]
    interval = Resampling(groups, chosen.strata, study.seed).interval
    difference_Q = chosen.values[study.metric] - baseline.values[study.metric]
    points = chosen.percent(study.metric) - baseline.percent(study.metric)
    return _verdict(points, interval(difference_Q), study.metric)


def _verdict(points: float, interval: tuple[float, float], metric: str) -> str:
    low, high = interval
    verdict = "significant" if low > 0 or high < 0 else "not significant"
    return (
        f"{points:+.2f} points [{low:+.2f}, {high:+.2f}] {metric} against the baseline on the same "
        f"queries, {verdict} at 95 %."
    )
