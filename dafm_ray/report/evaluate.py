"""The evaluate job: rank every system, write metrics, tables, figures and the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.config import EvaluateConfig, to_yaml
from dafm_ray.datasets.base import Query, digest
from dafm_ray.errors import DataError, refusals
from dafm_ray.evaluation.chance import RandomOrder
from dafm_ray.evaluation.metrics import UNRANKED, TargetRanks
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.evaluation.significance import Resampling
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.progress import status_writer
from dafm_ray.report.against import (
    METRICS,
    RANKS,
    Against,
    compare_runs,
    read_run,
    refuse_unlike_run,
)
from dafm_ray.report.cases import case_studies
from dafm_ray.report.figures import (
    FIGURES,
    ORDERS,
    Figure,
    read_figure,
    recall_figure,
    temperature_figures,
    write_figures,
)
from dafm_ray.report.notes import footing_notes, summary_notes
from dafm_ray.report.page import render
from dafm_ray.report.ranked import rank_all
from dafm_ray.report.results import result_table
from dafm_ray.report.sections import breakdown, by_text, contributions, write_sections
from dafm_ray.report.starts import Standings, compare_with_starts, refuse_unknown_starts
from dafm_ray.report.stores import refuse_unlike
from dafm_ray.report.tables import Table, to_csv, to_latex, to_markdown
from dafm_ray.storage import open_storage, results
from dafm_ray.tiles.manifest import Manifest
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import join, shown

PAGE = "report.html"


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: the table, what it says in words, and the path or URI of its page."""

    table: Table
    report: Path | str
    failures: int
    notes: tuple[str, ...]


def evaluate(config: EvaluateConfig, opened: Sequence[TileStore] | None = None) -> Evaluation:
    """Evaluate all sub-models and fusions of a store, or of several stores together.

    Writes `metrics.json`, `table.md`, `table.csv`, `table.tex`, `ranks.parquet`, `report.html`,
    `figures/`, `tables/` (the smaller tables) and the resolved `config.yaml` to `config.out`.

    Args:
        config: the job.
        opened: the stores, if some of their queries are hidden.

    Raises:
        ConfigError: an unknown fusion, or an unknown model among the starts.
        DataError: a store is incomplete or damaged, its queries have no targets, or the stores do
            not belong together.
        MachineError: the output folder cannot be written.
    """
    stores = list(opened or [TileStore(uri) for uri in config.stores])
    if config.models:
        stores = [store.of(config.models) for store in stores]
    refuse_unlike(stores)
    refuse_unknown_starts(config.starts, stores[0].models)
    queries = [query for store in stores for query in store.queries]
    labelled = np.flatnonzero([bool(query.targets) for query in queries])
    if not len(labelled):
        uris = ", ".join(store.uri for store in stores)
        raise DataError(f"{uris}: no query has a target, so there is nothing to count")
    drawn = [read_figure(join(study, f"{FIGURES}/{ORDERS}.svg")) for study in config.studies]
    manifests = [store.manifest for store in stores]
    run = read_run(config.against) if config.against else None
    if run is not None:
        refuse_unlike_run(run, manifests, queries)
    ranked = rank_all(stores, config, status_writer(open_storage(config.out)))
    counted = [queries[q] for q in labelled]
    categories = [query.category for query in counted]
    rules = protocol(stores[0].manifest.protocol)

    def summary(system: SystemRanks) -> Summary:
        return Summary(system.select(labelled), rules, categories)

    summaries = {system.name: summary(system) for system in ranked.systems}
    oracles = [summary(system) for system in ranked.oracles]
    strata_Q = next(iter(summaries.values())).strata
    groups = [query.fold_group for query in counted]
    resampling = Resampling(groups, strata_Q, config.seed)
    table = result_table(stores, counted, [*summaries.values(), *oracles], resampling)
    ablations = [(one, summary(ranks)) for one, ranks in ranked.ablations]
    against = compare_runs(run, counted, summaries, table.top.name, resampling) if run else None
    standings = None
    if config.chance or config.starts:
        sizes = [store.size("gallery") for store in stores for _ in store.queries]
        order = RandomOrder.of(counted, [sizes[q] for q in labelled])
        standings = compare_with_starts(summaries, order, config.starts, resampling)
    sections = [
        *([against.section()] if against else []),
        *([standings.section()] if standings else []),
        *contributions(ablations, summaries, resampling),
        *breakdown(counted, table, summaries, resampling),
        *by_text(counted, table, summaries, resampling),
    ]
    figures = [_curves(table, summaries), *drawn, *temperature_figures(config.fusions)]
    ranks = [{one.name: _ranks(one.ranks) for one in part} for part in ranked.parts]
    systems = [here.systems for here in ranked.made]
    cases = case_studies(stores, systems, ranks, (table.top.name, table.single), config)
    failures = [failure for store in stores for failure in store.failures()]
    notes = [
        *summary_notes(table),
        *(standings.notes if standings else []),
        *([against.note] if against else []),
    ]
    footing = footing_notes(stores, ranked.made, list(summaries.values()))
    texts = {
        METRICS: json.dumps(_metrics(manifests, table, standings, against, config), indent=1)
        + "\n",
        "table.md": to_markdown(table),
        "table.csv": to_csv(table),
        "table.tex": to_latex(table),
        PAGE: render(table, manifests, notes, footing, sections, figures, cases, failures),
        "config.yaml": to_yaml(config),
    }
    with refusals(shown(config.out)), results(config.out, PAGE) as out:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
        write_figures(figures, out)
        write_sections(sections, out)
        pq.write_table(_ranks_table(queries, ranked.systems), out / RANKS)
    report = open_storage(config.out).place(PAGE)
    return Evaluation(table, report, len(failures), (*notes, *footing))


def _curves(table: Table, summaries: dict[str, Summary]) -> Figure:
    """Of the single systems, the best static one and every learned one."""
    drawn = [
        row.name
        for row in table.systems
        if row.kind in ("single", "learned") or row.name == table.static
    ]
    macro = summaries[drawn[0]].strata is not None
    caption = "Recall@K of the single systems, the best static fusion and the learned ones" + (
        ", over all queries, not averaged by category" if macro else ""
    )
    return recall_figure({name: summaries[name].system.ranks.stored for name in drawn}, caption)


def _ranks(ranks: TargetRanks | None, queries: int = 0) -> list[int | None]:
    """Of the best targets; None if unranked, and for all queries where nothing was ranked."""
    if ranks is None:
        return [None] * queries
    return [None if rank == UNRANKED else rank for rank in ranks.stored.tolist()]


def _metrics(
    manifests: Sequence[Manifest],
    table: Table,
    standings: Standings | None,
    against: Against | None,
    config: EvaluateConfig,
) -> dict[str, Any]:
    first = manifests[0]
    published = table.published.rows if table.published else {}
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
                "gallery_digest": manifest.gallery_digest,
            }
            for manifest in manifests
        ],
        "caption": table.caption,
        "systems": [
            *(
                asdict(row)
                | {"vs": {n: asdict(p) for n, p in row.vs.items()}}
                | (standings.to_json(row.name) if standings else {})
                for row in table.rows
            ),
            *({"name": n, "kind": "published", "metrics": m} for n, m in published.items()),
        ],
        "chance": standings.chance if standings else None,
        "against": against.to_json() if against else None,
        "overlap": asdict(table.overlap),
        "versions": first.versions,
        "config_digest": digest([to_yaml(replace(config, out=""))]),
    }


def _ranks_table(queries: Sequence[Query], ranked: Sequence[SystemRanks]) -> pa.Table:
    ids = [query.id for query in queries]
    return pa.table(
        {
            "query": pa.array([id for _ in ranked for id in ids], pa.string()),
            "system": pa.array(
                [s.name for s in ranked for _ in ids], pa.string()
            ).dictionary_encode(),
            "rank": pa.array([rank for s in ranked for rank in _ranks(s.ranks)], pa.int64()),
            "subset_rank": pa.array(
                [rank for s in ranked for rank in _ranks(s.subset, len(ids))], pa.int64()
            ),
        }
    )
