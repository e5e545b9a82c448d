"""Folds of queries that never share a group, so that what is learnt on some is honest on others."""

import hashlib
from collections.abc import Sequence

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.metrics import Ints

NOBODY = -1
"""The fold of a query that is in none."""


def grouped_folds(queries: Sequence[Query], folds: int, seed: int = 0) -> Ints:
    """Which fold each query is held out in.

    Queries of one fold group (the same reference, concept or image set) stay together. Groups go,
    the largest first, to the fold with the fewest queries; equal ones in an order that the seed and
    their names fix, whatever the order of the queries.

    Args:
        queries: (Q,) of one store or several.
        folds: at least 2.
        seed: another one gives other folds.

    Returns:
        (Q,) int64 in [0, folds).

    Raises:
        ConfigError: fewer groups than folds.
    """
    members: dict[str, list[int]] = {}
    for position, query in enumerate(queries):
        # A query without a group is one of its own.
        members.setdefault(query.fold_group or f"\0{query.id}", []).append(position)
    if folds < 2 or len(members) < folds:
        raise ConfigError(
            f"{len(members)} groups of queries do not make {folds} folds; ask for 2 at least and "
            "for no more than there are groups"
        )
    order = sorted(members, key=lambda group: (-len(members[group]), _hash(seed, group), group))
    fold_of = np.empty(len(queries), dtype=np.int64)
    sizes = [0] * folds
    for group in order:
        smallest = sizes.index(min(sizes))
        fold_of[members[group]] = smallest
        sizes[smallest] += len(members[group])
    return fold_of


def folds_of_rows(fold_of_Q: Ints, rows_B: Ints) -> Ints:
    """(B,) fold of some queries; `NOBODY` for a row of -1, a query of no store."""
    return np.where(rows_B >= 0, fold_of_Q[rows_B], NOBODY)


def bank_folds(queries: Sequence[Query], folds: int, seed: int) -> Ints:
    """(Q,) grouped folds for the bank of a store's own queries, fewer where there are few groups;
    one fold where nothing can be kept apart.
    """
    alone = sum(not query.fold_group for query in queries)
    groups = len({query.fold_group for query in queries if query.fold_group}) + alone
    if groups < 2:
        return np.zeros(len(queries), dtype=np.int64)
    return grouped_folds(queries, min(folds, groups), seed)


def _hash(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
