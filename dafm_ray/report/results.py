"""From ranks to the result table: percents, intervals, and every system against its judges."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.overlap import overlap
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.significance import Paired, Resampling, compare
from dafm_ray.evaluation.summary import Summary
from dafm_ray.report.published import published_for
from dafm_ray.report.tables import Row, Table
from dafm_ray.tiles.manifest import Manifest, joint_title
from dafm_ray.tiles.store import TileStore
from dafm_ray.uris import shown

BASELINES = ("mean@zscore", "convex@zscore", "convex@zscore+bank")
"""Systems that every other one is compared with, beside the best single and the best static one."""


def result_table(
    stores: Sequence[TileStore],
    queries: Sequence[Query],
    summaries: Sequence[Summary],
    resampling: Resampling,
) -> Table:
    """Measure every system, and compare it with its judges on the same queries.

    Args:
        stores: of the queries.
        queries: those that are counted.
        summaries: of the systems, at least one of them single.
        resampling: of the queries.
    """
    single = _best(summaries, "single")
    static = _best(summaries, "static")
    assert single is not None
    judges = [single] + [
        summary
        for summary in summaries
        if summary.system.kind == "static"
        and (summary.system.name in BASELINES or summary is static)
    ]
    compared = {judge.system.name: _against(judge, summaries, resampling) for judge in judges}
    values = [column for summary in summaries for column in summary.values.values()]
    intervals = iter(resampling.intervals(np.stack(values, axis=1)))
    rows = []
    for summary in summaries:
        name, luck = summary.system.name, summary.total_hits()
        rows.append(
            Row(
                name=name,
                kind=summary.system.kind,
                queries=len(queries),
                metrics={m: round(summary.percent(m), 4) for m in summary.values},
                ci95={metric: next(intervals) for metric in summary.values},
                hits=luck["hits"],
                hits_best=luck["hits_best"],
                hits_worst=luck["hits_worst"],
                hits_expected=luck["hits_expected"],
                paired={
                    judge: others[name] for judge, others in compared.items() if name in others
                },
            )
        )
    manifest = stores[0].manifest
    return Table(
        caption=_caption(stores, queries),
        protocol=manifest.protocol,
        rows=tuple(rows),
        single=single.system.name,
        static=static.system.name if static else "",
        overlap=overlap(
            HEADLINE,
            {s.system.name: s.hits(HEADLINE) for s in summaries if s.system.kind == "single"},
        ),
        published=published_for([store.manifest for store in stores], tuple(rows[0].metrics)),
    )


def _against(
    judge: Summary, summaries: Sequence[Summary], resampling: Resampling
) -> dict[str, dict[str, Paired]]:
    """System -> metric -> comparison with one judge, corrected for all of them together."""
    asked = [
        (other.system.name, metric, other.values[metric], judge.values[metric])
        for other in summaries
        if other is not judge and other.system.kind != "oracle"
        for metric in judge.values
    ]
    found = compare([(metric, one, two) for _, metric, one, two in asked], resampling)
    by_system: dict[str, dict[str, Paired]] = {}
    for (name, metric, _, _), paired in zip(asked, found, strict=True):
        by_system.setdefault(name, {})[metric] = paired
    return by_system


def _best(summaries: Sequence[Summary], kind: str) -> Summary | None:
    """At the headline metric; of equal ones the first."""
    own = [summary for summary in summaries if summary.system.kind == kind]
    return max(own, key=lambda summary: summary.percent(HEADLINE), default=None)


def _caption(stores: Sequence[TileStore], queries: Sequence[Query]) -> str:
    manifests = [store.manifest for store in stores]
    first = manifests[0]
    roots = dict.fromkeys(manifest.dataset.get("root") for manifest in manifests)
    places = "".join(f" {shown(root)}" for root in roots if root)
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
