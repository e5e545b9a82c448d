"""The evaluate job: rank every system, write metrics, tables and the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import DatasetConfig, EvaluateConfig, to_yaml
from dafm_ray.datasets.base import Query, digest, refuse_duplicates
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.errors import DafmError, DataError, refusals
from dafm_ray.evaluation.metrics import UNRANKED
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.significance import Bootstrap, compare
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.convex import search_convex
from dafm_ray.fusion.rank import rank_systems, singles
from dafm_ray.fusion.static import Convex, static_fusion
from dafm_ray.progress import progress
from dafm_ray.report import cases as case_studies
from dafm_ray.report.page import render
from dafm_ray.report.tables import Row, Table, to_csv, to_latex, to_markdown
from dafm_ray.tiles.manifest import Manifest
from dafm_ray.tiles.store import TileStore

Z_MEAN = "mean@zscore"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: the table and where its files lie."""

    table: Table
    report: Path
    failures: int


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate all sub-models and fusions of a store.

    Writes `metrics.json`, `table.md`, `table.csv`, `table.tex`, `ranks.parquet`, `report.html`
    and the resolved `config.yaml` to `config.out`.

    Raises:
        ConfigError: an unknown fusion.
        DataError: the store is incomplete or damaged, or its queries have no targets.
        MachineError: the output folder cannot be written.
    """
    systems_named = [static_fusion(name) for name in config.fusions]
    store = TileStore(config.store)
    _refuse_incomplete(store)
    labelled = np.flatnonzero([bool(query.targets) for query in store.queries])
    if not len(labelled):
        raise DataError(f"{config.store}: no query has a target, so there is nothing to count")
    systems: list[Fusion] = [*singles(store), *systems_named]
    if config.tune_on:
        systems.append(_convex(store, TileStore(config.tune_on)))
    refuse_duplicates((system.name for system in systems), "system")
    rules = protocol(store.manifest.protocol)
    with progress("evaluate", len(store.queries), unit="query") as shown:
        ranked = rank_systems(store, systems, rules, shown)
    counted = [store.queries[q] for q in labelled]
    categories = [query.category for query in counted]
    summaries = [Summary(system.select(labelled), rules, categories) for system in ranked]
    table = _table(store.manifest, counted, summaries, config.seed)
    failures = store.failures()
    drawn = case_studies.sample_cases(
        store, systems, {s.name: _ranks(s) for s in ranked}, config.cases, config.seed
    )
    page = render(
        table, store.manifest, drawn, _pictures(store, drawn), failures, _notes(table, systems)
    )
    out = Path(config.out)
    with refusals(out):
        out.mkdir(parents=True, exist_ok=True)
        files = {
            "metrics.json": json.dumps(_metrics(store.manifest, table, config), indent=1) + "\n",
            "table.md": to_markdown(table),
            "table.csv": to_csv(table),
            "table.tex": to_latex(table),
            "report.html": page,
            "config.yaml": to_yaml(config),
        }
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        pq.write_table(_ranks_table(store, ranked), out / "ranks.parquet")
    return Evaluation(table, out / "report.html", len(failures))


def _refuse_incomplete(store: TileStore) -> None:
    missing = store.missing()
    if missing:
        raise DataError(
            f"{store.uri} lacks {len(missing)} tiles (first: {missing[0]}); "
            "run `dafm precompute` to the end first"
        )


def _convex(store: TileStore, other: TileStore) -> Convex:
    _refuse_incomplete(other)
    if other.models != store.models:
        raise DataError(
            f"{other.uri} holds the models {', '.join(other.models)}, {store.uri} holds "
            f"{', '.join(store.models)}; weights can only be searched on the same models"
        )
    for name in store.models:
        mine, theirs = store.manifest.models[name], other.manifest.models[name]
        if mine.weights_digest != theirs.weights_digest:
            raise DataError(f"model {name} has other weights in {other.uri} than in {store.uri}")
    shared = {query.id for query in store.queries} & {query.id for query in other.queries}
    if shared and store.manifest.gallery_digest == other.manifest.gallery_digest:
        raise DataError(
            f"{other.uri} holds queries of {store.uri} ({len(shared)} of them); weights searched "
            "on the queries they are reported on would be a leak"
        )
    return search_convex(other)


def _table(
    manifest: Manifest, queries: Sequence[Query], summaries: Sequence[Summary], seed: int
) -> Table:
    bootstrap = Bootstrap([query.fold_group for query in queries], seed)
    alone = [summary for summary in summaries if summary.system.kind == "single"]
    best = max(alone, key=lambda summary: (summary.percent(HEADLINE), summary.system.name))
    against = [best, *(s for s in summaries if s.system.name in (Z_MEAN, "convex@zscore"))]
    rows = []
    for summary in summaries:
        name = summary.system.name
        luck = summary.total_hits()
        rows.append(
            Row(
                name=name,
                kind=summary.system.kind,
                queries=len(queries),
                metrics={m: round(summary.percent(m), 4) for m in summary.values},
                ci95={m: bootstrap.interval(v) for m, v in summary.values.items()},
                hits=luck["hits"],
                hits_best=luck["hits_best"],
                hits_worst=luck["hits_worst"],
                hits_expected=luck["hits_expected"],
                vs={
                    other.system.name: compare(
                        summary.hits(HEADLINE), other.hits(HEADLINE), HEADLINE, bootstrap
                    )
                    for other in against
                    if other is not summary
                },
            )
        )
    spec = manifest.dataset
    name = " ".join(part for part in (spec["name"], spec["split"], spec.get("root")) if part)
    policy = "masked" if manifest.policy == "mask" else "kept"
    unlabelled = manifest.queries_size - len(queries)
    caption = (
        f"{name}, protocol {manifest.protocol}, reference {policy}, {len(queries):,} queries"
        f"{f' ({unlabelled:,} more have no target)' if unlabelled else ''}, gallery of "
        f"{manifest.gallery_size:,} images."
    )
    return Table(caption, tuple(rows), best.system.name)


def _notes(table: Table, systems: Sequence[Fusion]) -> list[str]:
    """The summary: what wins, by how much, and where the convex weights come from."""
    by_name = {row.name: row for row in table.rows}
    best = max(table.rows, key=lambda row: row.metrics[HEADLINE])
    single = by_name[table.baseline]
    notes = [f"Best single system: {single.name}, {HEADLINE} {single.metrics[HEADLINE]:.2f} %."]
    paired = best.vs.get(single.name)
    if paired is None:
        notes.append("No fusion is above it.")
    else:
        verdict = "significant" if paired.ci95[0] > 0 else "not significant"
        low, high = paired.ci95
        notes.append(
            f"Best system: {best.name}, {HEADLINE} {best.metrics[HEADLINE]:.2f} %: "
            f"{paired.diff:+.2f} points [{low:+.2f}, {high:+.2f}] against {single.name} on the "
            f"same queries, {verdict} at 95 %."
        )
    for system in systems:
        if isinstance(system, Convex):
            shares = ", ".join(f"{name} {weight:.2f}" for name, weight in system.weights.items())
            notes.append(f"Convex weights, searched on {system.searched_on}: {shares}.")
    return notes


def _pictures(store: TileStore, drawn: Sequence[case_studies.Case]) -> dict[str, str]:
    """Thumbnails, or none where the images are not at hand (a store of scores alone)."""
    try:
        dataset = load_dataset(DatasetConfig(**store.manifest.dataset))
    except (DafmError, TypeError):
        return {}
    if dataset.gallery.digest != store.manifest.gallery_digest:
        return {}
    return case_studies.thumbnails(dataset, drawn)


def _ranks(system: SystemRanks) -> list[int | None]:
    return [None if rank == UNRANKED else rank for rank in system.ranks.stored.tolist()]


def _metrics(manifest: Manifest, table: Table, config: EvaluateConfig) -> dict[str, Any]:
    return {
        "dataset": manifest.dataset,
        "protocol": manifest.protocol,
        "reference": manifest.policy,
        "queries": table.rows[0].queries,
        "gallery": manifest.gallery_size,
        "systems": [asdict(row) for row in table.rows],
        "versions": manifest.versions,
        "config_digest": digest([to_yaml(config)]),
    }


def _ranks_table(store: TileStore, ranked: Sequence[SystemRanks]) -> pa.Table:
    ids = [query.id for query in store.queries]
    return pa.table(
        {
            "query": pa.array([id for _ in ranked for id in ids], pa.string()),
            "system": pa.array(
                [s.name for s in ranked for _ in ids], pa.string()
            ).dictionary_encode(),
            "rank": pa.array([rank for s in ranked for rank in _ranks(s)], pa.int64()),
        }
    )
