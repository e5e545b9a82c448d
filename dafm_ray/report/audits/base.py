"""Audits: what a data set, its scores or a fusion's queries give away, in words and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.evaluation.protocols import HEADLINE, protocol
from dafm_ray.evaluation.summary import SystemRanks
from dafm_ray.fusion.base import Fusion
from dafm_ray.fusion.rank import rank_systems
from dafm_ray.progress import progress
from dafm_ray.report.findings import Section
from dafm_ray.tiles.store import TileStore

K = int(HEADLINE.partition("@")[2])


@dataclass(frozen=True)
class Audit:
    """What one audit found.

    Attributes:
        what: was audited.
        notes: sentences, the verdict first.
        table: the numbers.
        leaks: whether a number on these queries would be wrong.
        details: for machines.
    """

    what: str
    notes: tuple[str, ...]
    table: Section
    leaks: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def counted_ranks(store: TileStore, systems: Sequence[Fusion]) -> list[SystemRanks]:
    """Ranks of the queries that have targets."""
    store.refuse_incomplete()
    rows = labelled(store)
    with progress("audit", store.size("queries"), unit="query") as shown:
        ranked = rank_systems(store, systems, protocol(store.manifest.protocol), shown)
    return [system.select(rows) for system in ranked]


def labelled(store: TileStore) -> Ints:
    """Positions of the queries that have targets; DataError if none has."""
    rows = np.flatnonzero([bool(query.targets) for query in store.queries])
    if not len(rows):
        raise DataError(f"{store.uri}: no query has a target, so there is nothing to count")
    return rows
