"""Which candidates can no model tell apart, and which queries are asked twice?"""

from collections.abc import Sequence

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.audit import Fingerprints, asked_twice
from dafm_ray.progress import progress
from dafm_ray.report.audits.base import Audit
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore

SHOWN = 5
"""Examples that are printed."""


def audit_duplicates(store: TileStore) -> Audit:
    """Candidates that no model tells apart, and queries that are asked twice.

    Raises:
        ConfigError: the store keeps shortlists.
    """
    store.refuse_shortlist("The audit of duplicates")
    marks = Fingerprints(store.size("gallery"))
    with progress("duplicates", len(store.tile_rows) * len(store.models), unit="tile row") as shown:
        for model in store.models:
            for block in range(len(store.tile_rows)):
                marks.add(np.ascontiguousarray(store.scores(model, block)))
                shown.advance(1)
    twins = [[store.gallery_ids[n] for n in group] for group in marks.groups()]
    twin_of = {id: set(group) for group in twins for id in group}
    unfair = [query.id for query in store.queries if _has_twin_beside_targets(query, twin_of)]
    repeated = [[store.queries[q] for q in same] for same in asked_twice(store.queries)]
    contrary = [same for same in repeated if len({frozenset(q.targets) for q in same}) > 1]
    found: dict[str, list[list[str]]] = {
        "candidates with a twin": twins,
        "queries whose target has a twin that is no target": [[id] for id in unfair],
        "queries asked more than once": [[query.id for query in same] for same in repeated],
        "of these, with other targets": [[query.id for query in same] for same in contrary],
    }
    rows = tuple((what, f"{sum(map(len, own)):,}", f"{len(own):,}") for what, own in found.items())
    notes = [
        f"{store.manifest.title}: {sum(map(len, twins)):,} of {store.size('gallery'):,} candidates "
        f"cannot be told from another by any model; {len(unfair):,} queries have a target with a "
        "twin that is no target, and only the stored order says which of the two comes first.",
        *(f"{what}: {_examples(own)}" for what, own in found.items() if own),
    ]
    text = "Twins have the same scores under every model, bit for bit, for every query."
    section = Section("Duplicates", text, ("what", "number", "groups"), rows)
    return Audit(store.manifest.title, tuple(notes), section, details=found)


def _has_twin_beside_targets(query: Query, twin_of: dict[str, set[str]]) -> bool:
    ranked = set(query.targets) | set(query.excluded)
    return any(twin_of.get(target, set()) - ranked for target in query.targets)


def _examples(groups: Sequence[Sequence[str]]) -> str:
    shown = ", ".join(" = ".join(group) for group in groups[:SHOWN])
    return shown + (f" and {len(groups) - SHOWN:,} more" if len(groups) > SHOWN else "")
