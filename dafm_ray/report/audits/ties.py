"""How much does the order of equal scores decide?"""

from dafm_ray.evaluation.audit import ties
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.fusion.candidates import moments_of
from dafm_ray.fusion.rank import singles
from dafm_ray.fusion.static import static_fusion
from dafm_ray.report.audits.base import Audit, K, counted_ranks, labelled
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore


def audit_ties(store: TileStore) -> Audit:
    """How much the order of equal scores decides, for every model and the mean of z-scores."""
    systems = [*singles(store), static_fusion("mean@zscore", moments=moments_of(store))]
    rows, details = [], {}
    for system in counted_ranks(store, systems):
        found = ties(system.ranks, K)
        details[system.name] = vars(found)
        rows.append(
            (
                system.name,
                f"{found.tied:,}",
                f"{found.undecided:,}",
                *(str(hits) for hits in (found.worst, found.hits, found.best)),
                f"{found.expected:.2f}",
            )
        )
    worst = max(details.values(), key=lambda found: int(found["undecided"]))
    queries = len(labelled(store))
    share = 100 * worst["undecided"] / queries
    verdict = (
        f"{store.manifest.title}: ties decide up to {worst['undecided']:,} of {queries:,} hits at "
        f"{HEADLINE} ({share:.2f} points). Ours are broken in the stored order; counting them all "
        "for the target is the best case, and no number to publish."
    )
    text = (
        f"Queries whose target shares its score with another candidate, those that are a hit or a "
        f"miss at {HEADLINE} by the order of equal scores alone, and the hits if it is against the "
        "target, as stored, for the target, and random."
    )
    header = ("system", "tied", "undecided", "worst", "stored", "best", "random")
    return Audit(
        store.manifest.title,
        (verdict,),
        Section("Ties", text, header, tuple(rows)),
        details=details,
    )
