"""A system's ranks under a protocol: per-query values, hits, percents."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dafm_ray.evaluation.metrics import Floats, Ints, TargetRanks
from dafm_ray.evaluation.protocols import Protocol


@dataclass(frozen=True)
class SystemRanks:
    """The ranks of one system over all queries.

    Attributes:
        name: of the system.
        kind: single, static, learned, oracle.
        ranks: over the whole gallery.
        subset: over each query's group; None if the protocol has no groups.
    """

    name: str
    kind: str
    ranks: TargetRanks
    subset: TargetRanks | None

    def select(self, queries: Ints) -> "SystemRanks":
        """The ranks of some queries."""
        subset = self.subset.select(queries) if self.subset is not None else None
        return SystemRanks(self.name, self.kind, self.ranks.select(queries), subset)


class Summary:
    """The numbers of one system.

    Args:
        system: its ranks.
        protocol: which numbers.
        categories: (Q,) category of each query, used by macro protocols.
    """

    def __init__(self, system: SystemRanks, protocol: Protocol, categories: list[str]) -> None:
        self.system = system
        self.protocol = protocol
        self._categories = np.array(categories)

    def ranks_and_k(self, column: str) -> tuple[TargetRanks, int]:
        """`R@10` -> (gallery ranks, 10); `Rsubset@2` -> (subset ranks, 2)."""
        name, _, k = column.partition("@")
        ranks = self.system.subset if name == "Rsubset" else self.system.ranks
        assert ranks is not None
        return ranks, int(k)

    def hits(self, column: str) -> Ints:
        """(Q,) 1 where the query is a hit, ties in stored order."""
        ranks, k = self.ranks_and_k(column)
        return (ranks.stored <= k).astype(np.int64)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Hit columns this system has."""
        kept = self.protocol.columns
        if self.system.subset is None:
            kept = tuple(column for column in kept if not column.startswith("Rsubset"))
        return kept

    @cached_property
    def values(self) -> dict[str, Floats]:
        """Metric -> (Q,) per-query values whose mean is the metric / 100."""
        found = {column: self.hits(column).astype(np.float64) for column in self.columns}
        for k in self.protocol.average_precisions:
            found[f"mAP@{k}"] = self.system.ranks.average_precision(k)
        if self.protocol.mean_of and all(c in found for c in self.protocol.mean_of):
            found["Rmean"] = np.mean([found[c] for c in self.protocol.mean_of], axis=0)
        return found

    def percent(self, metric: str) -> float:
        """The metric in percent, averaged over categories first if the protocol says so."""
        values = self.values[metric]
        if not self.protocol.macro:
            return float(100 * values.mean())
        kinds = np.unique(self._categories)
        return float(100 * np.mean([values[self._categories == kind].mean() for kind in kinds]))

    def total_hits(self) -> dict[str, dict[str, int | float]]:
        """Hit counts by luck: stored order, best, worst, expected under random ties."""
        table: dict[str, dict[str, int | float]] = {
            "hits": {},
            "hits_best": {},
            "hits_worst": {},
            "hits_expected": {},
        }
        for column in self.columns:
            ranks, k = self.ranks_and_k(column)
            table["hits"][column] = int((ranks.stored <= k).sum())
            table["hits_best"][column] = int((ranks.best <= k).sum())
            table["hits_worst"][column] = int((ranks.worst <= k).sum())
            table["hits_expected"][column] = round(float(ranks.expected_hits(k).sum()), 4)
        return table
