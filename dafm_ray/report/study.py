"""What a study says: its trials as a table, what was chosen and what that is worth, its figures."""

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined

from dafm_ray.config import EvaluateConfig, StudyConfig, to_yaml
from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Floats
from dafm_ray.evaluation.significance import Bootstrap
from dafm_ray.fusion.artefact import load_artefact
from dafm_ray.fusion.folds import bank_folds
from dafm_ray.fusion.study import GROW, orders, shapley, static_setting
from dafm_ray.fusion.train import open_stores
from dafm_ray.fusion.trial import (
    FUSION,
    TRIALS,
    Trial,
    reporting,
    static_system,
    summary_of,
    values_of,
)
from dafm_ray.fusion.tune import Studied, run_study
from dafm_ray.markdown import markdown_table
from dafm_ray.report.evaluate import evaluate
from dafm_ray.report.figures import Figure, line_figure, scatter_figure, temperature_svg
from dafm_ray.tiles.storage import LocalStorage, Storage, open_storage

CHOSEN, BASELINE = "chosen", "baseline"

PUBLISHED = {
    "CIRR test1": ((82.07,), (83.0, 83.3), (83.9, 84.0), (84.43,)),
    "FashionIQ val": ((64.87,), (), (), (67.48,)),
}
"""DAFM, Figure 3: Rmean after each model that is added to SPRC, as far as the paper gives it."""


@dataclass(frozen=True)
class Section:
    """A table of the page."""

    title: str
    text: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class StudyReport:
    """A finished study: what it found, in words, and where its files lie."""

    notes: tuple[str, ...]
    table: str
    out: str
    failures: int


def report_study(study: StudyConfig) -> StudyReport:
    """Run a study to its end and write what it says.

    Writes `trials.parquet`, `trials.csv`, `report.html` and, where something is chosen,
    `chosen.yaml` to `study.out`; a study of networks adds the fusions `baseline/` and `chosen/` and
    `report/`, their evaluation on queries that decided nothing; one of orders adds `subsets.csv`,
    `orders.csv` and `models.csv`.

    Raises:
        ConfigError, DataError, MachineError: see `run_study` and `evaluate`.
    """
    studied = run_study(study)
    storage = open_storage(study.out)
    if isinstance(storage, LocalStorage):
        return _written(studied, storage, storage.root)
    with tempfile.TemporaryDirectory() as folder:
        report = _written(studied, storage, Path(folder))
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            storage.write(str(file.relative_to(folder)), pa.py_buffer(file.read_bytes()))
    return report


def _written(studied: Studied, storage: Storage, root: Path) -> StudyReport:
    root.mkdir(parents=True, exist_ok=True)
    kinds = {"networks": _networks, "orders": _orders, "static": _static}
    if not studied.usable:
        raise DataError(
            f"{studied.study.out}: no trial came to an end; the first failed with: "
            f"{next((trial.failure for trial in studied.trials if trial.failure), 'no record')}"
        )
    notes, sections, figures = kinds[studied.study.kind](studied, storage, root)
    failed = [trial for trial in studied.trials if trial.failure]
    if failed:
        notes.append(f"{len(failed)} of {len(studied.trials)} trials failed; the table says why.")
    header, rows = _trial_table(studied)
    pq.write_table(_parquet(studied), root / "trials.parquet")
    _write_csv(root / "trials.csv", header, rows)
    trials = Section("Trials", _decided(studied), tuple(header), tuple(map(tuple, rows)))
    environment = Environment(
        loader=PackageLoader("dafm_ray", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("study.html.j2").render(
        title=_title(studied),
        notes=notes,
        sections=[*sections, trials],
        figures=figures,
        config=to_yaml(studied.study),
        linked=studied.study.kind == "networks",
    )
    (root / "report.html").write_text(page, encoding="utf-8")
    table = markdown_table(header, rows, _words(studied))
    return StudyReport(tuple(notes), table, storage.uri, len(failed))


def _title(studied: Studied) -> str:
    stores = open_stores(studied.study.base)
    return " + ".join(store.manifest.title for store in stores)


def _decided(studied: Studied) -> str:
    """Which queries the numbers of the table come from."""
    study = studied.study
    folds = study.base.folds
    if study.kind == "static":
        return "Each number is over all queries of the store."
    if study.kind == "networks" and not study.base.validation_stores:
        return (
            f"Out of fold, on {folds - study.report_folds} of {folds} folds; the labels of the "
            "others were seen by no trial."
        )
    return f"Out of fold, each query ranked by networks that did not learn from it ({folds} folds)."


# The table of trials


def _keys(studied: Studied) -> list[str]:
    return list(dict.fromkeys(key for trial in studied.trials for key in trial.setting))


def _words(studied: Studied) -> int:
    return 1 + len(_keys(studied))


def _trial_table(studied: Studied) -> tuple[list[str], list[list[str]]]:
    """Best first; stopped trials with the numbers they had, failed ones last."""
    metric = studied.study.metric
    metrics = list(next(t.metrics for t in studied.usable if t.metrics) or {})
    others = [name for name in metrics if name != metric]
    keys = _keys(studied)
    header = ["trial", *keys, metric, "95 %", *others, "seconds", "remark"]
    rows = []
    failed = [trial for trial in studied.trials if trial.failure]
    for trial in (*studied.usable, *failed):
        known = trial.metrics or {}
        low, high = trial.ci95
        rows.append(
            [
                trial.name,
                *(_spoken(trial.setting.get(key)) for key in keys),
                "" if trial.failure else f"{trial.score:.2f}",
                f"{low:.2f} to {high:.2f}" if known else "",
                *(f"{known[name]:.2f}" if known else "" for name in others),
                f"{trial.seconds:.1f}",
                trial.failure or ("stopped early" if trial.stopped else _remark(studied, trial)),
            ]
        )
    return header, rows


def _remark(studied: Studied, trial: Trial) -> str:
    if studied.study.kind == "orders":
        return ""
    return BASELINE if trial.name == studied.baseline.name else ""


def _spoken(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _parquet(studied: Studied) -> pa.Table:
    trials = studied.trials
    names = list(dict.fromkeys(name for trial in trials for name in trial.metrics or {}))
    columns: dict[str, list[Any]] = {
        "trial": [trial.name for trial in trials],
        "setting": [json.dumps(trial.setting) for trial in trials],
        "score": [None if trial.failure else trial.score for trial in trials],
        "ci95_low": [trial.ci95[0] for trial in trials],
        "ci95_high": [trial.ci95[1] for trial in trials],
        **{name: [(trial.metrics or {}).get(name) for trial in trials] for name in names},
        "seconds": [trial.seconds for trial in trials],
        "stopped": [trial.stopped for trial in trials],
        "failure": [trial.failure for trial in trials],
    }
    return pa.table(columns)


def _write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    file.write_text(text.getvalue(), encoding="utf-8")


Parts = tuple[list[str], list[Section], list[Figure]]


# Networks


def _networks(studied: Studied, storage: Storage, root: Path) -> Parts:
    """Choose, and report the choice on queries that decided nothing."""
    study = studied.study
    chosen = next(trial for trial in studied.usable if not trial.stopped)
    baseline = studied.baseline
    if baseline.failure or baseline.stopped:
        raise DataError(f"the baseline came to nothing: {baseline.failure or 'stopped early'}")
    fusions = {BASELINE: baseline} if chosen is baseline else {BASELINE: baseline, CHOSEN: chosen}
    config = study.with_setting(chosen.setting)
    config = replace(config, out=str(Path(study.out) / "fusion"))
    (root / "chosen.yaml").write_text(to_yaml(config), encoding="utf-8")
    for name, trial in fusions.items():
        _fetch(storage, f"{TRIALS}/{trial.name}/{FUSION}", root / name)
    stores = reporting(study, config)
    folders = [str(root / name) for name in fusions]
    evaluate(
        EvaluateConfig(
            store=tuple(store.uri for store in stores),
            out=str(root / "report"),
            fusions=("mean@zscore", *folders),
            cases=study.base.cases,
            seed=study.seed,
        ),
        stores,
    )
    where = "the validation store" if study.base.validation_stores else "the folds kept back"
    notes = [
        f"Chosen by {study.metric} among {len(studied.trials)} trials: {_setting_words(chosen)}, "
        f"{chosen.score:.2f} % where it was chosen; the baseline ({_setting_words(baseline)}) has "
        f"{baseline.score:.2f} %."
    ]
    if chosen is baseline:
        notes.append("No setting is above the baseline, so the baseline is kept.")
    else:
        difference, (low, high) = _difference(studied, root, [BASELINE, CHOSEN])
        verdict = "significant" if low > 0 or high < 0 else "not significant"
        notes.append(
            f"On {where}, which decided nothing: {difference:+.2f} points [{low:+.2f}, "
            f"{high:+.2f}] {study.metric} against the baseline on the same queries, {verdict} at "
            "95 %."
        )
    figures = _searched(studied)
    worst = next(trial for trial in reversed(studied.usable) if not trial.stopped)
    with tempfile.TemporaryDirectory() as folder:
        for name, trial in (("best", chosen), ("baseline", baseline), ("worst", worst)):
            path = f"{TRIALS}/{trial.name}/{FUSION}/temperature.csv"
            trace = Path(folder) / f"{name}.csv"
            trace.write_bytes(storage.read(path).to_pybytes())
            words = f"Loss and temperature, {name}: {_setting_words(trial)}, {trial.score:.2f} %"
            figures.append(Figure(temperature_svg(trace), words))
    return notes, [], figures


def _fetch(storage: Storage, folder: str, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for path in storage.list(folder):
        (to / Path(path).name).write_bytes(storage.read(path).to_pybytes())


def _difference(
    studied: Studied, root: Path, names: Sequence[str]
) -> tuple[float, tuple[float, float]]:
    """The second fusion less the first, in points of the study's metric, on the queries that the
    choice is reported on.
    """
    study = studied.study
    stores = reporting(study, study.base)
    labelled = [query for store in stores for query in store.queries if query.targets]
    bootstrap = Bootstrap([query.fold_group for query in labelled], study.seed)
    summaries = []
    for name in names:
        artefact = load_artefact(root / name)
        own = [store.of(artefact.about.models) for store in stores]
        summaries.append(summary_of([artefact.on(store).learned for store in own], own))
    one, other = (summary.values[study.metric] for summary in summaries)
    difference = summaries[1].percent(study.metric) - summaries[0].percent(study.metric)
    return difference, bootstrap.interval(other - one, summaries[0].strata)


def _setting_words(trial: Trial) -> str:
    said = ", ".join(f"{key} {_spoken(value)}" for key, value in trial.setting.items())
    return said or "everything as in `fusion`"


def _searched(studied: Studied) -> list[Figure]:
    """The metric against every key that has numbers."""
    figures = []
    for key in _keys(studied):
        with_key = [trial for trial in studied.usable if key in trial.setting]
        values = [trial.setting[key] for trial in with_key]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(set(numbers)) < 3 or len(numbers) < len(values):
            continue
        spread = max(numbers) / min(numbers) if min(numbers) > 0 else 1
        svg = scatter_figure(
            numbers,
            [trial.score for trial in with_key],
            key,
            studied.study.metric,
            studied.baseline.score,
            spread > 30,
        )
        figures.append(
            Figure(svg, f"{studied.study.metric} against {key}; the line is the baseline")
        )
    return figures


# Static fusions


def _static(studied: Studied, storage: Storage, root: Path) -> Parts:
    """Choose for the queries of each fold by the others, so that every query has a number."""
    study = studied.study
    stores = open_stores(study.base)
    labelled = [query for store in stores for query in store.queries if query.targets]
    fold_of_Q = bank_folds(labelled, study.base.folds, study.base.seed)
    trials = studied.usable
    values_TQ = np.stack([values_of(study, trial, storage) for trial in trials])
    summary = summary_of([static_system(s, studied.baseline.setting) for s in stores], stores)
    out_of_fold_Q = np.empty(values_TQ.shape[1])
    picked: list[Trial] = []
    for fold in np.unique(fold_of_Q):
        others = fold_of_Q != fold
        best = int(np.argmax([np.nanmean(values_Q[others]) for values_Q in values_TQ]))
        picked.append(trials[best])
        out_of_fold_Q[~others] = values_TQ[best][~others]
    baseline_Q = values_of(study, studied.baseline, storage)
    low, high = Bootstrap([query.fold_group for query in labelled], study.seed).interval(
        out_of_fold_Q - baseline_Q, summary.strata
    )
    difference = 100 * _mean(out_of_fold_Q - baseline_Q)
    verdict = "significant" if low > 0 or high < 0 else "not significant"
    names = dict.fromkeys(_setting_words(trial) for trial in picked)
    chosen = trials[0]
    (root / "chosen.yaml").write_text(to_yaml(static_setting(chosen.setting)), encoding="utf-8")
    notes = [
        f"Best of {len(studied.trials)} settings over all queries: {_setting_words(chosen)}, "
        f"{study.metric} {chosen.score:.2f} %; the baseline ({_setting_words(studied.baseline)}) "
        f"has {studied.baseline.score:.2f} %.",
        f"Chosen for each fold by the others: {100 * _mean(out_of_fold_Q):.2f} %, "
        f"{difference:+.2f} points [{low:+.2f}, {high:+.2f}] against the baseline on the same "
        f"queries, {verdict} at 95 %. The folds chose: {'; '.join(names)}.",
    ]
    return notes, [], _searched(studied)


def _mean(values_Q: Floats) -> float:
    return float(np.nanmean(values_Q))


# Orders


def _orders(studied: Studied, storage: Storage, root: Path) -> Parts:
    """The lattice of subsets, the orders through it, what each model adds."""
    study = studied.study
    metric = study.metric
    value, spread = {}, {}
    for trial in studied.usable:
        if GROW not in trial.setting:
            numbers = trial.reported or trial.metrics or {}
            value[frozenset(trial.setting["models"])] = numbers[metric]
            spread[frozenset(trial.setting["models"])] = numbers
    models = sorted(set().union(*value))
    grown = {
        tuple(t.setting[GROW]): [s[metric] for s in t.steps]
        for t in studied.usable
        if GROW in t.setting
    }
    where = "the validation store" if study.base.validation_stores else "all queries, out of fold"
    if len(value) < 2 ** len(models) - 1:
        raise DataError(f"{study.out}: some subsets came to nothing, so no order is complete")
    paths = {
        order: [value[frozenset(order[: n + 1])] for n in range(len(order))]
        for order in orders(models)
    }
    from_first = [order for order in paths if order[0] == studied.first]
    falls = [order for order, path in paths.items() if (np.diff(path) < 0).any()]
    shares = shapley(models, value)
    last = {m: value[frozenset(models)] - value.get(frozenset(models) - {m}, 0.0) for m in models}
    alone = {m: studied.alone[m][metric] for m in models}
    table = [
        (
            m,
            f"{alone[m]:.2f}",
            f"{value[frozenset((m,))]:.2f}",
            f"{shares[m]:.2f}",
            f"{last[m]:+.2f}",
        )
        for m in sorted(models, key=lambda m: -shares[m])
    ]
    header = ("model", "alone", "trained alone", "Shapley value", "added last")
    _write_csv(root / "models.csv", header, table)
    names = list(next(iter(spread.values())))
    by_size = sorted(value, key=lambda subset: (len(subset), -value[subset]))
    subset_rows = [
        (" ".join(sorted(s)), str(len(s)), *(f"{spread[s][name]:.2f}" for name in names))
        for s in by_size
    ]
    _write_csv(root / "subsets.csv", ("models", "count", *names), subset_rows)
    order_rows = [
        (
            " ".join(order),
            str(n + 1),
            f"{path[n]:.4f}",
            f"{grown[order][n]:.4f}" if order in grown else "",
        )
        for order, path in paths.items()
        for n in range(len(models))
    ]
    _write_csv(
        root / "orders.csv", ("order", "models", f"{metric} trained", f"{metric} grown"), order_rows
    )
    notes = [
        f"{metric} on {where}: all {len(models)} models {value[frozenset(models)]:.2f} %, the best "
        f"alone ({studied.first}) {alone[studied.first]:.2f} %.",
        f"Of {len(paths)} orders through {len(value)} trained subsets, {len(paths) - len(falls)} "
        f"rise with every model and {len(falls)} fall at some step"
        + (f", as {' > '.join(falls[0])}." if falls else "."),
    ]
    if grown:
        ends = [path[-1] for path in grown.values()]
        notes.append(
            f"Grown model by model, where the order can matter, {len(grown)} orders end between "
            f"{min(ends):.2f} and {max(ends):.2f} % (spread {max(ends) - min(ends):.2f}); trained "
            f"at once, all of them end at {value[frozenset(models)]:.2f} %."
        )
    svg = line_figure(
        {order: paths[order] for order in from_first}, paths, grown, metric, PUBLISHED
    )
    caption = (
        f"{metric} on {where} against the number of fused models. Lines: the orders that start at "
        f"{studied.first}; grey: all other orders; dashed: grown model by model. Right: points "
        "that DAFM publishes for other models on its own data, not comparable with ours."
    )
    published = [
        (title, *(" / ".join(f"{p:.2f}" for p in points) or "not given" for points in steps))
        for title, steps in PUBLISHED.items()
    ]
    sections = [
        Section(
            "What each model adds",
            f"{metric} on {where}. The Shapley value is a model's gain "
            "averaged over all orders; they add up to the value of all models.",
            header,
            tuple(table),
        ),
        Section(
            "Subsets",
            f"Each trained once, on {where}.",
            ("models", "count", *names),
            tuple(subset_rows),
        ),
        Section(
            "Published",
            "DAFM, Figure 3, as far as the paper gives numbers: Rmean of 1, 2, 3 "
            "and 4 models, starting at SPRC. Published, not ours.",
            ("data", "1 model", "2 models", "3 models", "4 models"),
            tuple(published),
        ),
    ]
    return notes, sections, [Figure(svg, caption)]
