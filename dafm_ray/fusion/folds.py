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


def _hash(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
