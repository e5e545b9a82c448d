"""A study as a page and tables: its trials, what was chosen, what its figures show."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import StudyConfig, to_yaml
from dafm_ray.errors import DataError, refusals
from dafm_ray.files import write_csv
from dafm_ray.fusion.train import open_stores
from dafm_ray.fusion.trial import Trial
from dafm_ray.fusion.tune import Studied, run_study
from dafm_ray.markdown import markdown_table
from dafm_ray.report.choice import BASELINE, choose_network, choose_static, spoken, written
from dafm_ray.report.figures import write_figures
from dafm_ray.report.findings import Findings, Section
from dafm_ray.report.lattice import find_in_orders
from dafm_ray.report.templates import rendered
from dafm_ray.storage import Storage, open_storage, results
from dafm_ray.tiles.manifest import joint_title
from dafm_ray.uris import shown


@dataclass(frozen=True)
class StudyReport:
    """A finished study: its trials as Markdown, what they say, and where its files lie."""

    table: str
    notes: tuple[str, ...]
    out: str
    failures: int


def report_study(study: StudyConfig) -> StudyReport:
    """Run a study to its end and write what it says.

    Writes `trials.parquet`, `trials.csv` and `report.html` to `study.out`, and what `choice` and
    `lattice` say of its kind.

    Raises:
        ConfigError, MachineError: see `run_study`.
        DataError: nothing came to an end.
    """
    studied = run_study(study)
    if not studied.usable:
        reasons = [trial.failure for trial in studied.trials] or ["no trial left a record"]
        raise DataError(f"{study.out}: no trial came to an end; the first: {reasons[0]}")
    storage = open_storage(study.out)
    with refusals(shown(storage.uri)), results(storage.uri, "report.html") as root:
        return _written(studied, storage, root)


def _written(studied: Studied, storage: Storage, root: Path) -> StudyReport:
    findings = _findings(studied, storage, root)
    failures = sum(bool(trial.failure) for trial in studied.trials)
    notes = list(findings.notes)
    if failures:
        notes.append(f"{failures} of {len(studied.trials)} trials failed; the table says why.")
    header, rows = _trial_table(studied)
    words = 1 + len(studied.keys)
    shown = [
        (trial.name, spoken(trial), *row[words:])
        for trial, row in zip(studied.ordered, rows, strict=True)
    ]
    pq.write_table(_parquet(studied), root / "trials.parquet")
    write_csv(root / "trials.csv", header, rows)
    titles = ("trial", "setting", *header[words:])
    trials = Section("Trials", _where(studied), titles, tuple(shown), words=2)
    page = rendered(
        "study.html.j2",
        title=joint_title([store.manifest for store in open_stores(studied.study.base)]),
        notes=notes,
        sections=[*findings.sections, trials],
        figures=findings.figures,
        config=to_yaml(studied.study),
        linked=studied.study.kind == "networks",
    )
    (root / "report.html").write_text(page, encoding="utf-8")
    write_figures(findings.figures, root)
    table = markdown_table(header, rows, words)
    return StudyReport(table, tuple(notes), storage.uri, failures)


def _findings(studied: Studied, storage: Storage, root: Path) -> Findings:
    if studied.study.kind == "orders":
        return find_in_orders(studied, root)
    choose = choose_network if studied.study.kind == "networks" else choose_static
    return choose(studied, storage, root)


def _where(studied: Studied) -> str:
    """Which queries the numbers of the table come from."""
    study, folds = studied.study, studied.study.base.folds
    if study.kind == "static":
        return "Each number is over all queries."
    if study.kind == "networks" and not study.base.validation_stores:
        return (
            f"Out of fold, on {folds - study.report_folds} of {folds} folds; the labels of the "
            "others were seen by no trial."
        )
    return f"Out of fold: each query ranked by networks that did not learn from it ({folds} folds)."


def _trial_table(studied: Studied) -> tuple[list[str], list[list[str]]]:
    """Best first; stopped trials with the numbers they had, failed ones last."""
    metric = studied.study.metric
    names = next((list(trial.metrics) for trial in studied.usable if trial.metrics), [metric])
    others = [name for name in names if name != metric]
    header = ["trial", *studied.keys, metric, "95 %", *others, "seconds", "remark"]
    rows = []
    for trial in studied.ordered:
        known = trial.metrics or {}
        low, high = trial.ci95
        rows.append(
            [
                trial.name,
                *(written(trial.setting.get(key)) for key in studied.keys),
                "" if trial.failure else f"{trial.score:.2f}",
                f"{low:.2f} to {high:.2f}" if known else "",
                *(f"{known[name]:.2f}" if known else "" for name in others),
                f"{trial.seconds:.1f}",
                _remark(studied, trial),
            ]
        )
    return header, rows


def _remark(studied: Studied, trial: Trial) -> str:
    if trial.failure or trial.stopped:
        return trial.failure or "stopped early"
    chooses = studied.study.kind != "orders"
    return BASELINE if chooses and trial.name == studied.baseline.name else ""


def _parquet(studied: Studied) -> pa.Table:
    trials = studied.ordered
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
