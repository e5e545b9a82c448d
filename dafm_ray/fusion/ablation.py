"""A fusion that has to do without one of its models, not trained again."""

from dataclasses import dataclass

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
        rest_MBN = scores_MBN.copy()
        rest_MBN[self.index] = np.nan
        return self.system(rest_MBN, rows_B)
