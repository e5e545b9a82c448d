"""Two evaluations of the same queries, system by system."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dafm_ray.datasets.base import Query
from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import UNRANKED, Ints, TargetRanks
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.evaluation.significance import Paired, Resampling, compare
from dafm_ray.evaluation.summary import Summary, SystemRanks
from dafm_ray.report.findings import Cells, Section
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Manifest
from dafm_ray.uris import above, join, last_part, shown

METRICS, RANKS = "metrics.json", "ranks.parquet"


@dataclass(frozen=True)
class Run:
    """An earlier evaluation.

    Attributes:
        folder: where its files lie.
        protocol: of its numbers.
        policy: of its references.
        galleries: sorted digests.
        hits: system -> column -> count, as `metrics.json` has them.
        ranks: system -> query id -> (rank, rank in the group); None where there is none.
    """

    folder: str
    protocol: str
    policy: str
    galleries: list[str]
    hits: dict[str, dict[str, int]]
    ranks: dict[str, dict[str, tuple[int | None, int | None]]]


@dataclass(frozen=True)
class Against:
    """What changed.

    Attributes:
        run: folder of the earlier one.
        compared: our system, theirs, and metric -> comparison.
        best: which of these compares the best of each.
    """

    run: str
    compared: list[tuple[str, str, dict[str, Paired]]]
    best: int

    @property
    def note(self) -> str:
        """The best of each in a sentence."""
        mine, theirs, paired = self.compared[self.best]
        one = paired[HEADLINE]
        low, high = one.ci95
        verdict = "significant" if low > 0 or high < 0 else "not significant"
        if not one.win and not one.loss:
            return (
                f"Against {self.run}: {mine} hits the same queries at {HEADLINE} as {theirs} did."
            )
        return (
            f"Against {self.run}: {mine} is {one.diff:+.2f} points [{low:+.2f}, {high:+.2f}] at "
            f"{HEADLINE} against {theirs}, the best there, {verdict} at 95 %."
        )

    def section(self) -> Section:
        """As a table."""
        metrics = tuple(m for m in (HEADLINE, "Rmean") if m in self.compared[0][2])
        rows: tuple[Cells, ...] = tuple(
            (
                mine,
                theirs,
                *(paired[m] for m in metrics),
                f"{paired[HEADLINE].win}/{paired[HEADLINE].tie}/{paired[HEADLINE].loss}",
            )
            for mine, theirs, paired in self.compared
        )
        text = (
            f"This evaluation less that of {self.run}, on the same queries: points with their 95 % "
            "interval, * significant after Holm's correction over all systems and metrics. "
            "metrics.json has every metric."
        )
        header = ("here", "there", *metrics, f"win/tie/loss at {HEADLINE}")
        title = "Against an earlier run"
        return Section(title, text, header, rows, words=2, differences=metrics)

    def to_json(self) -> dict[str, Any]:
        """For `metrics.json`."""
        systems = [
            {"here": mine, "there": theirs, "metrics": {m: asdict(p) for m, p in paired.items()}}
            for mine, theirs, paired in self.compared
        ]
        return {"run": self.run, "systems": systems}


def read_run(path: str) -> Run:
    """Read an evaluation's folder, or the folder of its `metrics.json`.

    Raises:
        DataError: it is none, or it is damaged.
    """
    where = above(path) if last_part(path) == METRICS else path
    storage, folder = open_storage(where), shown(where)
    read: dict[str, pa.Buffer] = {}
    for name in (METRICS, RANKS):
        try:
            read[name] = storage.read(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DataError(
                f"{shown(path)} is no evaluation: there is no {join(folder, name)}"
            ) from None
    try:
        metrics = json.loads(read[METRICS].to_pybytes())
        columns = pq.read_table(pa.BufferReader(read[RANKS])).to_pydict()
        within = columns.get("subset_rank", [None] * len(columns["rank"]))
        ranks: dict[str, dict[str, tuple[int | None, int | None]]] = {}
        places = (columns["system"], columns["query"], columns["rank"], within)
        for system, query, rank, subset in zip(*places, strict=True):
            ranks.setdefault(system, {})[query] = (rank, subset)
        galleries = sorted(store["gallery_digest"] for store in metrics["stores"])
        hits = {one["name"]: one["hits"] for one in metrics["systems"] if one.get("hits")}
        return Run(folder, metrics["protocol"], metrics["reference"], galleries, hits, ranks)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder} is no evaluation, or it is damaged ({reason})") from None


def refuse_unlike_run(run: Run, manifests: Sequence[Manifest], queries: Sequence[Query]) -> None:
    """DataError unless a run ranked the same queries over the same galleries by one protocol."""
    first = manifests[0]
    for what, mine, theirs in (
        ("protocol", first.protocol, run.protocol),
        ("reference policy", first.policy, run.policy),
        ("galleries", sorted(manifest.gallery_digest for manifest in manifests), run.galleries),
    ):
        if mine != theirs:
            raise DataError(
                f"{run.folder} has {what} {theirs!r}, this evaluation has {mine!r}; only numbers "
                "of one protocol compare"
            )
    asked = {query.id for query in queries}
    for name, known in run.ranks.items():
        if unknown := asked ^ set(known):
            raise DataError(
                f"{run.folder} and this evaluation do not hold the same queries: {len(unknown)} "
                f"are in one alone, as {min(unknown)!r} under {name}"
            )


def compare_runs(
    run: Run,
    queries: Sequence[Query],
    summaries: dict[str, Summary],
    best: str,
    resampling: Resampling,
) -> Against:
    """Compare the systems that both evaluations have, and the best of each.

    Args:
        run: the earlier one.
        queries: those that are counted.
        summaries: name -> numbers of our systems.
        best: name of ours.
        resampling: of the queries.

    Raises:
        DataError: no system to compare with, or ranks that contradict the run's own hits.
    """
    rules, categories = summaries[best].protocol, [query.category for query in queries]
    theirs = {
        name: Summary(_ranks_of(name, known, queries), rules, categories)
        for name, known in run.ranks.items()
    }
    if not theirs:
        raise DataError(f"{run.folder} holds no system")
    for name, summary in theirs.items():
        counted = {column: int(summary.hits(column).sum()) for column in summary.columns}
        told = run.hits.get(name, {})
        if counted != {column: told.get(column) for column in counted}:
            raise DataError(
                f"{run.folder}: {RANKS} and {METRICS} do not have the same hits for {name}; they "
                "are damaged, or of two evaluations"
            )
    top = max(theirs, key=lambda name: (theirs[name].percent(HEADLINE), name))
    names = [(name, name) for name in summaries if name in theirs]
    if (best, top) not in names:
        names.append((best, top))
    asked = [
        (mine, other, metric)
        for mine, other in names
        for metric in summaries[mine].values
        # Average precision needs the ranks of all targets.
        if metric in theirs[other].values and not metric.startswith("mAP")
    ]
    found = compare(
        [(m, summaries[mine].values[m], theirs[other].values[m]) for mine, other, m in asked],
        resampling,
    )
    compared: dict[tuple[str, str], dict[str, Paired]] = {}
    for (mine, other, metric), paired in zip(asked, found, strict=True):
        compared.setdefault((mine, other), {})[metric] = paired
    pairs = [(*pair, metrics) for pair, metrics in compared.items()]
    return Against(run.folder, pairs, list(compared).index((best, top)))


def _ranks_of(
    name: str, known: dict[str, tuple[int | None, int | None]], queries: Sequence[Query]
) -> SystemRanks:
    ranks, subsets = zip(*(known[query.id] for query in queries), strict=True)
    grouped = all(subset is not None for subset in subsets)
    return SystemRanks(name, "", _targets(ranks), _targets(subsets) if grouped else None)


def _targets(ranks: Sequence[int | None]) -> TargetRanks:
    """Stored ranks alone: ties and further targets are not known."""
    stored_Q: Ints = np.array([UNRANKED if rank is None else rank for rank in ranks])
    none_Q = np.zeros_like(stored_Q)
    return TargetRanks(stored_Q, stored_Q - 1, none_Q, none_Q, stored_Q[:, None], none_Q + 1)
