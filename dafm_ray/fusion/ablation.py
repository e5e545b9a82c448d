"""A fusion that has to do without one of its models, not trained again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np

from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.base import Fusion


@dataclass(frozen=True)
class Without:
    """What a system gives where one model scored nothing.

    Attributes:
        system: that is asked.
        model: name of the model that is left out.
        index: its place in the store.
    """

    system: Fusion
    model: str
    index: int
    kind: str = "ablation"

    @property
    def name(self) -> str:
        """The system's, and what it lacks."""
        return f"{self.system.name} without {self.model}"

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """As in `Fusion`; a candidate that only this model scored is not ranked."""
        return self.system(lacking(scores_MBN, self.index), rows_B)


@runtime_checkable
class Ablated(Protocol):
    """A system that works out once what it gives without each of several models."""

    def without(self, scores_MBN: Scores, rows_B: Ints, models: Sequence[int]) -> Iterator[Scores]:
        """What `Without` gives, bit for bit, for each of these models of the store."""
        ...


def fused(systems: Sequence[Fusion], scores_MBN: Scores, rows_B: Ints) -> Iterator[Scores]:
    """What each system gives; neighbours that lack a model of the same system share its work."""
    for _, alike in groupby(systems, _worked_out_with):
        first, *others = list(alike)
        if isinstance(first, Without) and isinstance(first.system, Ablated):
            models = [one.index for one in (first, *others) if isinstance(one, Without)]
            yield from first.system.without(scores_MBN, rows_B, models)
        else:
            for system in (first, *others):
                yield system(scores_MBN, rows_B)


def _worked_out_with(system: Fusion) -> int:
    return id(system.system if isinstance(system, Without) else system)


def lacking(scores_MBN: Scores, index: int) -> Scores:
    """A copy in which one model scored nothing."""
    rest_MBN = scores_MBN.copy()
    rest_MBN[index] = np.nan
    return rest_MBN
