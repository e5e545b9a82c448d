"""What does ranking shortlists lose against ranking all candidates?"""

import numpy as np

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import Ints, rank_targets
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.candidates import columns_in, listed_targets, positions_in
from dafm_ray.fusion.rank import masked_scores, top_candidates
from dafm_ray.fusion.systems import Maker
from dafm_ray.progress import progress
from dafm_ray.report.audits.base import Audit, K
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore

DEPTHS = (1, 10, 50)


def audit_shortlist(short: TileStore, whole: TileStore, fusion: str) -> Audit:
    """Compare the first candidates and the hits of one system on both stores of the same queries.

    Args:
        short: keeps shortlists.
        whole: keeps the scores of all candidates.
        fusion: as `dafm rank` takes it.

    Raises:
        ConfigError: the first store keeps no shortlists, or the second does; no such fusion.
        DataError: other queries, another gallery or other models; an incomplete store.
    """
    if not short.manifest.shortlist:
        raise ConfigError(f"{short.uri} keeps no shortlist; name the store that does first")
    whole.refuse_shortlist("The comparison")
    for store in (short, whole):
        store.refuse_incomplete()
    _refuse_other(short, whole)
    tops, hits = zip(*(_ranked(store, fusion) for store in (short, whole)), strict=True)
    found = {
        str(k): float(np.mean([_shared(a[:k], b[:k]) for a, b in zip(*tops, strict=True)]))
        for k in DEPTHS
        if k <= min(len(whole.gallery_ids), short.manifest.shortlist)
    }
    listed_Q = listed_targets(short)
    listed = float(listed_Q.mean()) if len(listed_Q) else float("nan")
    recalls = [100 * float(np.mean(own_Q)) if len(own_Q) else float("nan") for own_Q in hits]
    widths = [(short.shortlist(q) >= 0).sum(axis=1).mean() for q in range(len(short.tile_rows))]
    kept = float(np.mean(widths))
    depth, share = list(found.items())[min(1, len(found) - 1)]
    notes = (
        f"{short.manifest.title}: {100 * share:.2f} % of the first {depth} of {fusion} are found "
        f"in shortlists of {kept:,.0f} of {short.size('gallery'):,} candidates (the first "
        f"{short.manifest.shortlist} of each of {len(short.models)} models).",
        f"{HEADLINE} {recalls[0]:.2f} % on shortlists, {recalls[1]:.2f} % on all candidates; "
        f"{100 * listed:.2f} % of the targets are listed.",
    )
    rows = tuple((k, f"{100 * share:.2f}") for k, share in found.items())
    text = "Share of the first K of all candidates that is among the first K of the shortlists."
    return Audit(
        short.manifest.title,
        notes,
        Section("Shortlists", text, ("K", "found (%)"), rows),
        details={
            "found": found,
            "listed": listed,
            "kept": kept,
            HEADLINE: {"shortlist": recalls[0], "all": recalls[1]},
        },
    )


def _refuse_other(short: TileStore, whole: TileStore) -> None:
    for what in ("gallery_digest", "queries_digest"):
        if getattr(short.manifest, what) != getattr(whole.manifest, what):
            raise DataError(f"{short.uri} and {whole.uri} hold another {what.partition('_')[0]}")
    if short.models != whole.models:
        raise DataError(
            f"{short.uri} holds {', '.join(short.models)}, {whole.uri} {', '.join(whole.models)}; "
            "make both with one configuration, the other with shortlist: 0"
        )
    for name in short.models:
        if not short.manifest.models[name].may_equal(whole.manifest.models[name]):
            raise DataError(f"model {name} has other weights in {short.uri} than in {whole.uri}")


def _ranked(store: TileStore, fusion: str) -> tuple[Ints, list[bool]]:
    """(Q, K) gallery positions of the first candidates, and the hits of queries with targets."""
    system: Fusion = Maker([fusion]).on(store).systems[-1]
    tops, hits = [], []
    with progress("audit", store.size("queries"), unit="query") as shown:
        for chunk in masked_scores(store):
            fused_BN = system(chunk.scores_MBN, np.array(chunk.rows))
            first_BK = top_candidates(fused_BN, max(DEPTHS))
            positions_BK = positions_in(store, chunk.rows, first_BK)
            missing = max(DEPTHS) - positions_BK.shape[1]
            tops.append(np.pad(positions_BK, [(0, 0), (0, missing)], constant_values=-1))
            queries = store.queries[chunk.rows.start : chunk.rows.stop]
            targets_BT = columns_in(store, chunk.rows, [query.targets for query in queries])
            hit_B = rank_targets(fused_BN, targets_BT).stored <= K
            hits += [bool(h) for h, query in zip(hit_B, queries, strict=True) if query.targets]
            shown.advance(len(queries))
    return np.concatenate(tops), hits


def _shared(one: Ints, other: Ints) -> float:
    there = other[other >= 0]
    return float(np.isin(there, one).mean()) if len(there) else 1.0
