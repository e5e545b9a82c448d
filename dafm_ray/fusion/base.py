"""What a fusion is: scores of several models in, one score a candidate out."""

from typing import Protocol

from dafm_ray.evaluation.metrics import Scores


class Fusion(Protocol):
    """A system that ranks the gallery from the sub-models' scores."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def kind(self) -> str:
        """`single`, `static` or `learned`."""
        ...

    def __call__(self, scores_MBN: Scores) -> Scores:
        """Fuse.

        Args:
            scores_MBN: M models in the store's order, float32; NaN where a candidate was not
                scored or is masked.

        Returns:
            (B, N) scores, higher is better; NaN where no model scored the candidate.
        """
        ...
