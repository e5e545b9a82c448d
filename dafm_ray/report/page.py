"""The report: one self-contained HTML page that works from file://."""

from collections.abc import Sequence

from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.report.cases import CaseStudies
from dafm_ray.report.figures import Figure
from dafm_ray.report.findings import Section
from dafm_ray.report.tables import Table
from dafm_ray.report.templates import rendered
from dafm_ray.tiles.manifest import Manifest, joint_title
from dafm_ray.tiles.store import Failure

_FAILURES_SHOWN = 50


def render(
    table: Table,
    manifests: Sequence[Manifest],
    notes: Sequence[str],
    footing: Sequence[str],
    sections: Sequence[Section],
    figures: Sequence[Figure],
    studies: CaseStudies,
    failures: Sequence[Failure],
) -> str:
    """Render the page; every text from the data is escaped.

    Args:
        table: the results.
        manifests: of the stores, for the protocol box.
        notes: sentences for the summary.
        footing: sentences on what the numbers stand on.
        sections: further tables.
        figures: drawings.
        studies: queries with their rankings and pictures.
        failures: items that could not be used.
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
        notes=notes,
        footing=footing,
        sections=sections,
        figures=figures,
        studies=studies,
        failures=failures[:_FAILURES_SHOWN],
        failures_total=len(failures),
        headline=HEADLINE,
    )
