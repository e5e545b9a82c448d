"""Single-modality baselines on any pair of CLIP towers: the image alone, the text alone."""

from collections.abc import Sequence

from torch import Tensor

from dafm_ray.models.base import unit
from dafm_ray.models.clip4cir import ClipModel


class ZeroShot(ClipModel):
    """`zeroshot:image` ranks by the reference alone, `zeroshot:text` by the text alone.

    Reads the towers of every file that CLIP4CIR's loader reads.
    """

    variants = ("image", "text")

    @property
    def uses_reference(self) -> bool:
        """False for the text alone."""
        return self.variant == "image"

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D), L2-normalised feature of the one modality."""
        if self.variant == "text":
            return unit(self.encode_texts(captions_B))
        return unit(self.encode_images(references_R3HW))[reference_index_B]
