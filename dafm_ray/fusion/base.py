"""What a fusion is: scores of several models in, one score a candidate out."""

from typing import Protocol

from dafm_ray.evaluation.metrics import Ints, Scores


class Fusion(Protocol):
    """A system that ranks the gallery of a store from the sub-models' scores."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def kind(self) -> str:
        """`single`, `static` or `learned`."""
        ...

    def __call__(self, scores_MBN: Scores, rows_B: Ints) -> Scores:
        """Fuse.

        Args:
            scores_MBN: M models in the store's order, float32; NaN where a candidate was not
                scored or is masked.
            rows_B: positions of the queries in the store, which systems with folds read; -1 for a
                query that is in no store.

        Returns:
            (B, N) scores, higher is better; NaN where no model scored the candidate.
        """
        ...
