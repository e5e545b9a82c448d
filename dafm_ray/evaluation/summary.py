"""A system's ranks under a protocol: per-query values, hits, percents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dafm_ray.evaluation.metrics import Floats, Ints, TargetRanks, stratified_mean
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

    @staticmethod
    def concatenate(parts: Sequence["SystemRanks"]) -> "SystemRanks":
        """Join the ranks of one system over several sets of queries."""
        subsets = [part.subset for part in parts if part.subset is not None]
        return SystemRanks(
            parts[0].name,
            parts[0].kind,
            TargetRanks.concatenate([part.ranks for part in parts]),
            TargetRanks.concatenate(subsets) if len(subsets) == len(parts) else None,
        )


class Summary:
    """The numbers of one system.

    Args:
        system: its ranks.
        protocol: which numbers.
        categories: (Q,) category of each query, used by macro protocols.

    Attributes:
        strata: (Q,) number of each query's category under a macro protocol, else None.
    """

    def __init__(self, system: SystemRanks, protocol: Protocol, categories: Sequence[str]) -> None:
        self.system = system
        self.protocol = protocol
        names, category_of = np.unique(np.array(categories, dtype=object), return_inverse=True)
        self._queries_of = {name: np.flatnonzero(category_of == n) for n, name in enumerate(names)}
        self.strata: Ints | None = category_of if protocol.macro else None
        self._count = len(categories)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Hit columns this system has; a macro protocol has those of each category first."""
        kept = self.protocol.columns
        if self.system.subset is None:
            kept = tuple(column for column in kept if not column.startswith("Rsubset"))
        if not self.protocol.macro or len(self._queries_of) == 1:
            return kept
        return (*(f"{name} {column}" for name in self._queries_of for column in kept), *kept)

    def ranks_and_k(self, column: str) -> tuple[TargetRanks, int]:
        """`R@10` -> (gallery ranks, 10); `Rsubset@2` -> (subset ranks, 2); `dress R@10`: of its
        queries alone.
        """
        category, _, total = column.rpartition(" ")
        name, _, k = total.partition("@")
        ranks = self.system.subset if name == "Rsubset" else self.system.ranks
        assert ranks is not None
        return ranks.select(self._queries_of[category]) if category else ranks, int(k)

    def hits(self, column: str) -> Ints:
        """1 for each query of the column that is a hit, ties in stored order."""
        ranks, k = self.ranks_and_k(column)
        return (ranks.stored <= k).astype(np.int64)

    @cached_property
    def values(self) -> dict[str, Floats]:
        """Metric -> (Q,) per-query values whose mean over `strata` is the metric / 100; NaN
        where a query is not of the column's category.
        """
        found: dict[str, Floats] = {}
        for column in self.columns:
            category = column.rpartition(" ")[0]
            values = np.full(self._count, np.nan)
            values[self._queries_of[category] if category else slice(None)] = self.hits(column)
            found[column] = values
        for k in self.protocol.average_precisions:
            found[f"mAP@{k}"] = self.system.ranks.average_precision(k)
        if self.protocol.mean_of and all(c in found for c in self.protocol.mean_of):
            found["Rmean"] = np.mean([found[c] for c in self.protocol.mean_of], axis=0)
        return found

    def percent(self, metric: str) -> float:
        """The metric in percent; under a macro protocol the mean over categories."""
        return 100 * stratified_mean(self.values[metric], self.strata)

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
