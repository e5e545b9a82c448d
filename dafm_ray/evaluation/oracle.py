"""The best system of each query: an upper bound that is mostly luck.

Whoever may choose after seeing the answer profits from every difference between systems, also from
noise. So the oracle never stands without its control: the oracle over noisy copies of one score.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from dafm_ray.evaluation.metrics import Ints, TargetRanks
from dafm_ray.evaluation.summary import SystemRanks


def best_of(systems: Sequence[SystemRanks], name: str) -> SystemRanks:
    """For each query the ranks under the system that ranks its target first, kind `oracle`."""
    subsets = [system.subset for system in systems if system.subset is not None]
    return SystemRanks(
        name,
        "oracle",
        _best([system.ranks for system in systems]),
        _best(subsets) if len(subsets) == len(systems) else None,
    )


def _best(ranks: Sequence[TargetRanks]) -> TargetRanks:
    chosen_Q: Ints = np.argmin([one.stored for one in ranks], axis=0)
    rows_Q = np.arange(len(chosen_Q))
    columns = {
        field.name: np.stack([getattr(one, field.name) for one in ranks])[chosen_Q, rows_Q]
        for field in fields(TargetRanks)
    }
    return TargetRanks(**columns)
