"""The evaluate job: rank every system, write metrics, tables and the report."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import EvaluateConfig, to_yaml
from dafm_ray.datasets.base import Query, digest
from dafm_ray.errors import ConfigError, DataError, refusals
from dafm_ray.evaluation.metrics import UNRANKED
from dafm_ray.evaluation.overlap import overlap
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.significance import Bootstrap, compare
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.fusion.artefact import is_artefact
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.rank import rank_systems, singles
from dafm_ray.fusion.static import Convex
from dafm_ray.fusion.systems import Maker, Systems, tuned_on
from dafm_ray.progress import progress
from dafm_ray.report import cases as case_studies
from dafm_ray.report.figures import temperature_figures
from dafm_ray.report.page import render
from dafm_ray.report.stores import refuse_leaks, refuse_unlike
from dafm_ray.report.tables import Row, Table, to_csv, to_latex, to_markdown
from dafm_ray.tiles.manifest import Manifest, joint_title
from dafm_ray.tiles.store import TileStore

BASELINES = ("mean@zscore", "convex@zscore", "convex@zscore+bank")
"""Systems that every other one is compared with, beside the best single one."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: the table, what it says in words, and where its files lie."""

    table: Table
    report: Path
    failures: int
    notes: tuple[str, ...]


def evaluate(config: EvaluateConfig, opened: Sequence[TileStore] | None = None) -> Evaluation:
    """Evaluate all sub-models and fusions of a store, or of several stores together.

    Writes `metrics.json`, `table.md`, `table.csv`, `table.tex`, `ranks.parquet`, `report.html`
    and the resolved `config.yaml` to `config.out`.

    Args:
        config: the job.
        opened: the stores, if some of their queries are hidden.

    Raises:
        ConfigError: an unknown fusion.
        DataError: a store is incomplete or damaged, its queries have no targets, or the stores do
            not belong together.
        MachineError: the output folder cannot be written.
    """
    stores = list(opened or [TileStore(uri) for uri in config.stores])
    refuse_unlike(stores)
    queries = [query for store in stores for query in store.queries]
    labelled = np.flatnonzero([bool(query.targets) for query in queries])
    if not len(labelled):
        uris = ", ".join(store.uri for store in stores)
        raise DataError(f"{uris}: no query has a target, so there is nothing to count")
    made = _systems(stores, config)
    rules = protocol(stores[0].manifest.protocol)
    with progress("evaluate", len(queries), unit="query") as shown:
        parts = [
            rank_systems(store, here.systems, rules, shown)
            for store, here in zip(stores, made, strict=True)
        ]
    ranked = [SystemRanks.concatenate(same) for same in zip(*parts, strict=True)]
    counted = [queries[q] for q in labelled]
    categories = [query.category for query in counted]
    summaries = [Summary(system.select(labelled), rules, categories) for system in ranked]
    manifests = [store.manifest for store in stores]
    table = _table(stores, counted, summaries, config)
    failures = [failure for store in stores for failure in store.failures()]
    cases, pictures = _cases(stores, made, parts, config)
    notes = _notes(table, made, summaries)
    figures = temperature_figures(config.fusions)
    page = render(table, manifests, cases, pictures, failures, notes, figures)
    out = Path(config.out)
    with refusals(out):
        out.mkdir(parents=True, exist_ok=True)
        files = {
            "metrics.json": json.dumps(_metrics(manifests, table, config), indent=1) + "\n",
            "table.md": to_markdown(table),
            "table.csv": to_csv(table),
            "table.tex": to_latex(table),
            "report.html": page,
            "config.yaml": to_yaml(config),
        }
        for name, text in files.items():
            (out / name).write_text(text, encoding="utf-8")
        pq.write_table(_ranks_table(queries, ranked), out / "ranks.parquet")
    return Evaluation(table, out / "report.html", len(failures), tuple(notes))


def _systems(stores: Sequence[TileStore], config: EvaluateConfig) -> list[Systems]:
    """The systems of every store, alike in their names."""
    tuned = None
    names = list(config.fusions)
    if config.tuning_stores:
        others = [TileStore(uri) for uri in config.tuning_stores]
        refuse_leaks(stores, others)
        tuned = tuned_on(others, config.bank_t)
        static = sum(not is_artefact(name) for name in names)
        names = sorted(names, key=is_artefact)
        names.insert(static, tuned[0].name)
    maker = Maker(names, config.bank_t, config.bank, tuned)
    made = []
    for store in stores:
        here = maker.on(store)
        made.append(Systems([*singles(store), *here.systems], here.notes))
        _refuse_same_names(made[-1].systems)
    return made


def _refuse_same_names(systems: Sequence[Fusion]) -> None:
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two systems are called {name!r}; name a fusion once, and call no model like one"
            )


def _cases(
    stores: Sequence[TileStore],
    made: Sequence[Systems],
    parts: Sequence[Sequence[SystemRanks]],
    config: EvaluateConfig,
) -> tuple[list[case_studies.Case], dict[str, str]]:
    """Cases of every store in turn, and their pictures."""
    cases: list[case_studies.Case] = []
    pictures: dict[str, str] = {}
    for n, (store, here, ranked) in enumerate(zip(stores, made, parts, strict=True)):
        count = (config.cases + n) // len(stores)
        ranks = {system.name: _ranks(system) for system in ranked}
        drawn = case_studies.sample_cases(store, here.systems, ranks, count, config.seed)
        cases.extend(drawn)
        pictures |= case_studies.thumbnails(store, case_studies.pictured(drawn))
    return cases, pictures


def _table(
    stores: Sequence[TileStore],
    queries: Sequence[Query],
    summaries: Sequence[Summary],
    config: EvaluateConfig,
) -> Table:
    bootstrap = Bootstrap([query.fold_group for query in queries], config.seed)
    alone = [summary for summary in summaries if summary.system.kind == "single"]
    best = max(alone, key=lambda summary: (summary.percent(HEADLINE), summary.system.name))
    against = [best, *_static_judges(summaries, best)]
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
                ci95={m: bootstrap.interval(v, summary.strata) for m, v in summary.values.items()},
                hits=luck["hits"],
                hits_best=luck["hits_best"],
                hits_worst=luck["hits_worst"],
                hits_expected=luck["hits_expected"],
                vs={
                    other.system.name: compare(
                        summary.hits(HEADLINE),
                        other.hits(HEADLINE),
                        HEADLINE,
                        bootstrap,
                        summary.strata,
                    )
                    for other in against
                    if other is not summary
                },
            )
        )
    return Table(
        caption=_caption(stores, queries),
        protocol=stores[0].manifest.protocol,
        rows=tuple(rows),
        baseline=best.system.name,
        overlap=overlap(HEADLINE, {s.system.name: s.hits(HEADLINE) for s in alone}),
    )


def _static_judges(summaries: Sequence[Summary], single: Summary) -> list[Summary]:
    """The baselines, and the best static system if that is another one."""
    static = [summary for summary in summaries if summary.system.kind == "static"]
    best = max(static, key=lambda summary: summary.percent(HEADLINE), default=single)
    return [s for s in static if s.system.name in BASELINES or s is best]


def _caption(stores: Sequence[TileStore], queries: Sequence[Query]) -> str:
    manifests = [store.manifest for store in stores]
    first = manifests[0]
    roots = dict.fromkeys(manifest.dataset.get("root") for manifest in manifests)
    places = "".join(f" {root}" for root in roots if root)
    policy = "masked" if first.policy == "mask" else "kept"
    hidden = sum(len(store.hidden) for store in stores)
    unlabelled = sum(manifest.queries_size for manifest in manifests) - len(queries) - hidden
    several = "galleries" if len(manifests) > 1 else "gallery"
    sizes = " + ".join(f"{manifest.gallery_size:,}" for manifest in manifests)
    counts = Counter(query.category for query in queries)
    macro = ""
    if protocol(first.protocol).macro:
        shares = ", ".join(f"{name or 'unnamed'} {count:,}" for name, count in counts.items())
        macro = (
            f" Mean over {len(counts)} categories without weights ({shares} queries)."
            if len(counts) > 1
            else f" One category alone ({shares} queries), no mean over categories."
        )
    return (
        f"{joint_title(manifests)}{places}, protocol {first.protocol}, reference {policy}, "
        f"{len(queries):,} queries"
        f"{f' ({unlabelled:,} more have no target)' if unlabelled else ''}"
        f"{f' ({hidden:,} others are left out)' if hidden else ''}, {several} of "
        f"{sizes} images.{macro}{_without_groups(first, queries)}"
    )


def _without_groups(manifest: Manifest, queries: Sequence[Query]) -> str:
    """Why a protocol's subset recall is not shown."""
    grouped = any(query.group for query in queries)
    if not protocol(manifest.protocol).subset_recalls or not (
        grouped or manifest.protocol == "cirr"
    ):
        return ""
    lacking = sum(not set(query.group) & set(query.targets) for query in queries)
    if not lacking:
        return ""
    return (
        f" Subset recalls are left out: {lacking:,} queries have no group that holds their target."
    )


def _notes(table: Table, made: Sequence[Systems], summaries: Sequence[Summary]) -> list[str]:
    """The summary: what wins, by how much, whether learning pays, where weights and banks come
    from, what is missing.
    """
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
    notes.extend(_verdicts(table))
    for system in made[0].systems:
        if isinstance(system, Convex):
            shares = ", ".join(f"{name} {weight:.2f}" for name, weight in system.weights.items())
            notes.append(f"Convex weights, searched on {system.searched_on}: {shares}.")
    notes.extend(dict.fromkeys(note for here in made for note in here.notes))
    for summary in summaries:
        unscored = int((summary.system.ranks.stored == UNRANKED).sum())
        if unscored:
            notes.append(
                f"{summary.system.name} did not score the target of {unscored:,} queries; they "
                "count as misses."
            )
    return notes


def _verdicts(table: Table) -> list[str]:
    """Whether each learned fusion is above the best static one of the table."""
    static = [row for row in table.rows if row.kind == "static"]
    if not static:
        return []
    best = max(static, key=lambda row: row.metrics[HEADLINE])
    said = []
    for row in table.rows:
        if row.kind != "learned":
            continue
        paired = row.vs[best.name]
        low, high = paired.ci95
        points = (
            f"{row.name} is {paired.diff:+.2f} points [{low:+.2f}, {high:+.2f}] at {HEADLINE} "
            f"against {best.name} on the same queries"
        )
        if low > 0:
            said.append(f"Learning pays: {points}.")
        elif high < 0:
            said.append(f"Learning does harm here: {points}. Use {best.name}.")
        else:
            said.append(
                f"Learning does not pay here: {points}, which may be chance. {best.name} does as "
                "well without a network."
            )
    return said


def _ranks(system: SystemRanks) -> list[int | None]:
    return [None if rank == UNRANKED else rank for rank in system.ranks.stored.tolist()]


def _metrics(manifests: Sequence[Manifest], table: Table, config: EvaluateConfig) -> dict[str, Any]:
    first = manifests[0]
    return {
        "dataset": first.dataset,
        "protocol": first.protocol,
        "reference": first.policy,
        "queries": table.rows[0].queries,
        "gallery": sum(manifest.gallery_size for manifest in manifests),
        "stores": [
            {
                "dataset": manifest.dataset,
                "queries": manifest.queries_size,
                "gallery": manifest.gallery_size,
            }
            for manifest in manifests
        ],
        "caption": table.caption,
        "systems": [asdict(row) for row in table.rows],
        "overlap": asdict(table.overlap),
        "versions": first.versions,
        "config_digest": digest([to_yaml(config)]),
    }


def _ranks_table(queries: Sequence[Query], ranked: Sequence[SystemRanks]) -> pa.Table:
    ids = [query.id for query in queries]
    return pa.table(
        {
            "query": pa.array([id for _ in ranked for id in ids], pa.string()),
            "system": pa.array(
                [s.name for s in ranked for _ in ids], pa.string()
            ).dictionary_encode(),
            "rank": pa.array([rank for s in ranked for rank in _ranks(s)], pa.int64()),
        }
    )
