"""Were the models trained on the queries that a fusion is to learn from?"""

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.audit import FIRST, Shift, shift
from dafm_ray.evaluation.significance import SIGNIFICANT, holm
from dafm_ray.fusion.rank import singles
from dafm_ray.fusion.stacking import has_seen, learned_from
from dafm_ray.report.audits.base import Audit, counted_ranks, labelled
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore


def audit_stacking(store: TileStore, held_out: TileStore | None = None) -> Audit:
    """Whether the models were trained on the queries that a fusion is to learn from.

    Scores on queries a model was trained on are better than on new ones, and a fusion that learns
    from them trusts that model too much.

    Args:
        store: what a fusion learns from.
        held_out: the same models on queries that none of them saw.

    Raises:
        DataError: other models or weights in the other store, or queries of `store` itself.
    """
    rows, details, leaks = [], {}, []
    shifts = {} if held_out is None else _shifts(store, held_out)
    corrected = holm(np.array([found.p for found in shifts.values()]))
    suspects = [
        name
        for (name, found), p in zip(shifts.items(), corrected, strict=True)
        if p < SIGNIFICANT and found.diff > 0
    ]
    for name in store.models:
        known, seen = learned_from(store, name), has_seen(store, name)
        leaks += [name] if seen else []
        verdict = "LEAK" if seen else "not these" if known else "unknown"
        cells = [", ".join(known) or "not recorded", verdict]
        if (found := shifts.get(name)) is not None:
            low, high = found.ci95
            difference = f"{found.diff:+.2f} [{low:+.2f}, {high:+.2f}]"
            cells += [f"{found.here:.2f}", f"{found.there:.2f}", difference]
        rows.append((name, *cells))
        details[name] = {"trained on": known, "leak": seen} | (vars(found) if found else {})
    title = store.manifest.title
    notes = [
        f"{title}: {', '.join(leaks)} learned from these queries; a fusion must not."
        if leaks
        else f"{title}: no model records that it learned from these queries."
    ]
    if silent := [name for name, found in details.items() if not found["trained on"]]:
        notes.append(
            f"What {', '.join(silent)} learned from is not known; compare with queries that no "
            "model has seen (--held-out)."
        )
    header: tuple[str, ...] = ("model", "trained on", "verdict")
    text = "What the weights record of their training."
    if held_out is not None:
        theirs = held_out.manifest.title
        header = (*header, title, theirs, "difference")
        text += (
            f" Percent of the queries whose target stands in the first {FIRST:.0%} of the gallery, "
            f"and the difference in points with its 95 % interval: above 0 the queries of {title} "
            "are easier, or were seen. Verdicts after Holm's correction over the models."
        )
        notes.append(
            f"Better on {title} than on {theirs} beyond chance: {', '.join(suspects)}. If all "
            "models are, the queries may be easier; if some are, those may have seen them."
            if suspects
            else f"No model is better on {title} than on {theirs} beyond chance."
        )
    section = Section("Stacking", text, header, tuple(rows), words=3)
    return Audit(title, tuple(notes), section, leaks=bool(leaks), details=details)


def _shifts(store: TileStore, held_out: TileStore) -> dict[str, Shift]:
    if {query.id for query in store.queries} & {query.id for query in held_out.queries}:
        raise DataError(f"{held_out.uri} holds queries of {store.uri}; hold other queries out")
    theirs = held_out.manifest.models
    for name in store.models:
        if name not in theirs or not theirs[name].may_equal(store.manifest.models[name]):
            raise DataError(f"{held_out.uri} does not hold the model {name} of {store.uri}")
    held_out = held_out.of(store.models)
    both = [counted_ranks(one, singles(one)) for one in (store, held_out)]
    sizes = store.size("gallery"), held_out.size("gallery")
    groups = tuple([one.queries[q].fold_group for q in labelled(one)] for one in (store, held_out))
    return {
        here.name: shift(here.ranks, there.ranks, sizes, groups)
        for here, there in zip(*both, strict=True)
    }
