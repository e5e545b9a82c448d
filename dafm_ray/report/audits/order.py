"""Does an order give targets away?"""

from dataclasses import replace

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Gallery
from dafm_ray.datasets.order import CUTOFFS, JUDGED, order_leak
from dafm_ray.datasets.registry import DATASETS, read_dataset
from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.report.audits.base import Audit
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore

SOURCE, SORTED = "order of the files", "sorted by id"

LEAK = 0.01
"""An order whose p-value is below is said to leak."""


def audit_order(what: str, named: DatasetConfig) -> Audit:
    """What positions alone find: in the order of the source, by id, and in the stored order.

    Args:
        what: a store, or the name of a data set.
        named: split, category and annotations, where it is a data set.

    Raises:
        ConfigError, DataError: no such store or data set.
    """
    if what in DATASETS:
        draft = read_dataset(replace(named, name=what))
        title, queries = draft.title, draft.queries
        source = [id for id, _ in draft.images]
    else:
        store = _opened(what)
        title, queries = store.manifest.title, store.queries
        source = [id for _, id in sorted(zip(store.source_order, store.gallery_ids, strict=True))]
    orders = {
        SOURCE: source,
        SORTED: sorted(source),
        "stored order (hash)": list(Gallery.from_source(dict.fromkeys(source, "")).ids),
    }
    rows, details, leaking = [], {}, {}
    for name, ids in orders.items():
        leak = order_leak(ids, queries)
        if leak is None:
            raise DataError(f"{what}: no query has a target in the gallery; nothing can be found")
        shares = [100 * hits / leak.queries for hits in leak.hits.values()]
        chance = 100 * leak.chance / leak.queries
        rows.append((name, *(f"{share:.2f}" for share in shares), f"{chance:.2f}", f"{leak.p:.3f}"))
        details[name] = {"hits": leak.hits, "queries": leak.queries, "p": leak.p}
        if leak.p < LEAK:
            found = 100 * leak.hits[JUDGED] / leak.queries
            leaking[name] = f"R@{JUDGED} {found:.2f} % by positions alone, {chance:.2f} % by chance"
    notes = [
        f"{title}: the order of its files leaks ({leaking[SOURCE]}). What is ranked in that order, "
        "or breaks ties by it, profits; galleries of this project stand in hash order."
        if SOURCE in leaking
        else f"{title}: the order of its files gives no target away."
    ]
    if SORTED in leaking:
        notes.append(f"Sorted by id the images leak ({leaking[SORTED]}): ids are no shuffle.")
    text = (
        "Candidates ranked by their distance to the reference in an order, forward before "
        f"backward; no pixel and no word. p: one-sided permutation test of R@{JUDGED}."
    )
    header = ("order", *(f"R@{k}" for k in CUTOFFS), f"R@{JUDGED} by chance", "p")
    return Audit(title, tuple(notes), Section("Order", text, header, tuple(rows)), details=details)


def _opened(uri: str) -> TileStore:
    try:
        return TileStore(uri)
    except DataError as error:
        if "/" in uri or "." in uri:
            raise
        raise ConfigError(
            f"{unknown('data set', uri, DATASETS)}; and as a store: {error}"
        ) from None
