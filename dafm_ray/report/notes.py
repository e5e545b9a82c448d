"""The result in sentences: what a person reads first, and what a number stands on."""

from collections import Counter
from collections.abc import Iterator, Sequence

from dafm_ray.evaluation.metrics import UNRANKED
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.evaluation.summary import Summary
from dafm_ray.fusion.candidates import listed_targets
from dafm_ray.fusion.static import Convex
from dafm_ray.fusion.systems import Systems
from dafm_ray.report.tables import Row, Table
from dafm_ray.tiles.store import TileStore


def summary_notes(table: Table) -> list[str]:
    """What wins and by how much, whether fusing and learning pay, what an oracle would reach."""
    return [*_best(table), *_fusing(table), *_verdicts(table), *_oracle(table)]


def footing_notes(
    stores: Sequence[TileStore], made: Sequence[Systems], summaries: Sequence[Summary]
) -> list[str]:
    """Where weights and banks come from, and what is missing."""
    cut = Counter[str]()
    for store in stores:
        cut.update({model: len(queries) for model, queries in store.cut_texts().items()})
    notes = [
        f"{model} read {count:,} texts cut, they are too long for it."
        for model, count in cut.items()
    ]
    for system in made[0].systems:
        if isinstance(system, Convex):
            shares = ", ".join(f"{name} {weight:.2f}" for name, weight in system.weights.items())
            notes.append(f"Convex weights, searched on {system.searched_on}: {shares}.")
    notes.extend(dict.fromkeys(note for here in made for note in here.notes))
    if any(store.manifest.shortlist for store in stores):
        notes.extend(_shortlists(stores))
        return notes
    for summary in summaries:
        unscored = int((summary.system.ranks.stored == UNRANKED).sum())
        if unscored:
            notes.append(
                f"{summary.system.name} did not score the target of {unscored:,} queries; they "
                "count as misses."
            )
    return notes


def _shortlists(stores: Sequence[TileStore]) -> Iterator[str]:
    for store in stores:
        k = store.manifest.shortlist
        if k:
            listed_Q = listed_targets(store)
            lost = int((~listed_Q).sum())
            yield (
                f"{store.manifest.title} keeps the first {k} candidates of each of "
                f"{len(store.manifest.models)} models: {lost:,} of {len(listed_Q):,} "
                "targets are in no list and count as misses, and groups are not ranked."
            )


def _best(table: Table) -> list[str]:
    single, best = table.row(table.single), table.top
    notes = [f"Best single system: {single.name}, {HEADLINE} {single.metrics[HEADLINE]:.2f} %."]
    if best is single:
        return [*notes, "No fusion is above it."]
    paired = best.vs[single.name]
    verdict = "significant at 95 %" if paired.ci95[0] > 0 else "not significant at 95 %"
    if paired.ci95[0] > 0 and not paired.is_significant:
        verdict += " alone, but not after Holm's correction over the table"
    return [
        *notes,
        f"Best system: {best.name}, {HEADLINE} {best.metrics[HEADLINE]:.2f} %: "
        f"{_points(best, single.name)} against {single.name} on the same queries, {verdict}.",
    ]


def _fusing(table: Table) -> list[str]:
    """Whether these models should be fused at all: the best rule without weights to search."""
    rules = [row for row in table.rows if row.name == "mean@zscore"]
    if not rules or len(table.overlap.hits) < 2:
        return []
    [row] = rules
    low, high = row.vs[table.single].ci95
    said = f"mean@zscore, which learns nothing, is {_points(row, table.single)} against the best"
    if low > 0:
        return [f"Fusing pays: {said} single system."]
    if high < 0:
        return [f"Fusing alike does harm: {said} single system. Weights are needed."]
    return [f"Fusing alike is not enough: {said} single system, which may be chance."]


def _verdicts(table: Table) -> list[str]:
    """Whether each learned fusion is above the best static one of the table."""
    if not table.static:
        return []
    best = table.static
    said = []
    for row in table.rows:
        if row.kind != "learned":
            continue
        low, high = row.vs[best].ci95
        points = (
            f"{row.name} is {_points(row, best)} at {HEADLINE} against {best} on the same queries"
        )
        if low > 0:
            said.append(f"Learning pays: {points}.")
        elif high < 0:
            said.append(f"Learning does harm here: {points}. Use {best}.")
        else:
            said.append(
                f"Learning does not pay here: {points}, which may be chance. {best} does as "
                "well without a network."
            )
    return said


def _oracle(table: Table) -> list[str]:
    if not table.oracles:
        return []
    oracle, control = (row.metrics[HEADLINE] for row in table.oracles)
    verdict = "so that much is luck" if control < oracle else "so all of it may be luck"
    return [
        f"The best model of each query, chosen after seeing the answer, would reach {oracle:.2f} "
        "%; the same choice among as many copies of one score that differ by noise alone reaches "
        f"{control:.2f} %, {verdict}."
    ]


def _points(row: Row, judge: str) -> str:
    paired = row.vs[judge]
    low, high = paired.ci95
    return f"{paired.diff:+.2f} points [{low:+.2f}, {high:+.2f}]"
