"""Tables below the result table: what each model is worth, and where systems differ."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.metrics import Floats
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.evaluation.significance import Paired, Resampling, compare
from dafm_ray.evaluation.slices import by_mention, slices
from dafm_ray.evaluation.summary import Summary
from dafm_ray.fusion.ablation import Without
from dafm_ray.report.findings import Section
from dafm_ray.report.tables import ABSENT, Table, latex, latex_table, line

TABLES = "tables"
"""Folder of the smaller tables beside a report."""

_DIFFERENCE = "difference"


def contributions(
    ablations: Sequence[tuple[Without, Summary]],
    whole: dict[str, Summary],
    resampling: Resampling,
) -> list[Section]:
    """What each fusion loses without each model.

    Args:
        ablations: fusions that lack a model, and what they reach.
        whole: name of a fusion -> what it reaches with all models.
        resampling: of the queries.
    """
    if not ablations:
        return []
    values = {name: summary.values[HEADLINE] for name, summary in whole.items()}
    pairs = [
        (HEADLINE, summary.values[HEADLINE], values[one.system.name]) for one, summary in ablations
    ]
    found = compare(pairs, resampling)
    rows = [
        (one.model, one.system.name, f"{summary.percent(HEADLINE):.2f}", paired)
        for (one, summary), paired in zip(ablations, found, strict=True)
    ]
    text = (
        f"{HEADLINE} of a fusion that has to do without one model, not trained again, and the "
        "difference to the whole fusion in points, with its 95 % interval; * significant after "
        "Holm's correction. Where the interval lies around 0 the model may be superfluous, or the "
        "queries too few to tell."
    )
    title, header = "What each model is worth", ("without", "fusion", HEADLINE, _DIFFERENCE)
    return [Section(title, text, header, tuple(rows), words=2, differences=(_DIFFERENCE,))]


def breakdown(
    queries: Sequence[Query], table: Table, summaries: dict[str, Summary], resampling: Resampling
) -> list[Section]:
    """The headline metric by category and by length of the text, the best system against the best
    single one.

    Args:
        queries: that are counted.
        table: says which systems these are.
        summaries: name -> numbers of the system.
        resampling: of the queries.
    """
    best, single = summaries[table.top.name], summaries[table.single]
    shown = [single] if best is single else [single, best]
    parts = slices(queries)
    found: list[Paired] = []
    if best is not single:
        pairs = [
            (part.name, _only(best, part.queries), _only(single, part.queries)) for part in parts
        ]
        found = compare(pairs, resampling)
    rows = [
        (
            part.name,
            str(len(part.queries)),
            *(f"{100 * resampling.mean(_only(one, part.queries)):.2f}" for one in shown),
            found[n] if found else ABSENT,
            f"{found[n].win}/{found[n].tie}/{found[n].loss}" if found else ABSENT,
        )
        for n, part in enumerate(parts)
    ]
    text = (
        f"{HEADLINE} of some of the queries, the difference in points with its 95 % interval "
        "(* significant after Holm's correction), and on how many queries each is ahead. Lengths "
        "are those of the modification text."
    )
    names = tuple(one.system.name for one in shown)
    header = ("queries", "number", *names, _DIFFERENCE, "win/tie/loss")
    section = Section("Where it helps", text, header, tuple(rows), differences=(_DIFFERENCE,))
    return [section] if rows else []


def by_text(
    queries: Sequence[Query], table: Table, summaries: dict[str, Summary], resampling: Resampling
) -> list[Section]:
    """The headline metric of every system where the text mentions a colour or a pattern.

    Args:
        queries: that are counted.
        table: says which systems there are.
        summaries: name -> numbers of the system.
        resampling: of the queries.
    """
    parts = by_mention(queries)
    if not parts:
        return []
    rows = tuple(
        (
            row.name,
            *(
                f"{100 * resampling.mean(_only(summaries[row.name], part.queries)):.2f}"
                for part in parts
            ),
        )
        for row in table.systems
    )
    text = (
        f"{HEADLINE} of every system where the text mentions a colour or a pattern, and elsewhere."
    )
    header = ("system", *(f"{part.name} ({len(part.queries):,})" for part in parts))
    return [Section("What the text is about", text, header, rows)]


def write_sections(sections: Sequence[Section], folder: Path) -> None:
    """Write each table as CSV and LaTeX to `tables` in a folder, named after its title."""
    (folder / TABLES).mkdir(exist_ok=True)
    for section in sections:
        name = re.sub(r"[^a-z0-9]+", "_", section.title.lower()).strip("_")
        section.write_csv(folder / TABLES / f"{name}.csv")
        lines = [line(map(latex, row)) for row in section.shown]
        text = latex_table(section.text, section.header, lines, section.words)
        (folder / TABLES / f"{name}.tex").write_text(text, encoding="utf-8")


def _only(summary: Summary, queries: np.ndarray) -> Floats:
    """(Q,) headline values; NaN outside of some queries."""
    values_Q = np.full(len(summary.values[HEADLINE]), np.nan)
    values_Q[queries] = summary.values[HEADLINE][queries]
    return values_Q
