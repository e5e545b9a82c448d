"""The report: one self-contained HTML page that works from file://."""

from collections.abc import Mapping, Sequence

from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.report.cases import Case
from dafm_ray.report.figures import Figure
from dafm_ray.report.tables import Table
from dafm_ray.report.templates import rendered
from dafm_ray.tiles.manifest import Manifest, joint_title
from dafm_ray.tiles.store import Failure

_FAILURES_SHOWN = 50


def render(
    table: Table,
    manifests: Sequence[Manifest],
    cases: Sequence[Case],
    pictures: Mapping[str, str],
    failures: Sequence[Failure],
    notes: Sequence[str],
    figures: Sequence[Figure],
) -> str:
    """Render the page; every text from the data is escaped.

    Args:
        table: the results.
        manifests: of the stores, for the protocol box.
        cases: queries with their rankings.
        pictures: gallery id -> data URI.
        failures: items that could not be used.
        notes: sentences for the summary.
        figures: drawings of how fusions were trained.
    """
    return rendered(
        "page.html.j2",
        table=table,
        manifests=manifests,
        title=joint_title(manifests),
        models={
            name: list(dict.fromkeys(manifest.models[name] for manifest in manifests))
            for name in sorted(manifests[0].models)
        },
        cases=cases,
        pictures=pictures,
        failures=failures[:_FAILURES_SHOWN],
        failures_total=len(failures),
        notes=notes,
        figures=figures,
        headline=HEADLINE,
    )
