"""What the models on one kind of towers share: their parts, what their files say, how they read."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from dafm_ray.models.base import FrozenModel
from dafm_ray.models.blip import BlipSizes
from dafm_ray.models.captions import join_capitalised
from dafm_ray.models.clip_towers import TowerSizes, token_ids
from dafm_ray.models.preprocess import target_pad, to_tensor
from dafm_ray.models.qformer import FormerSizes
from dafm_ray.models.wordpieces import WordPieces


class Padded(FrozenModel):
    """Pictures and captions as CLIP4CIR and all that followed it read them."""

    sizes: TowerSizes | BlipSizes | FormerSizes

    def preprocess(self, image: Image.Image) -> Tensor:
        """TargetPad 1.25, bicubic resize, centre crop, CLIP statistics."""
        return to_tensor(image, self.sizes.image_size, target_pad)

    def caption(self, captions: Sequence[str]) -> str:
        """Stripped, the first capitalised, joined with " and "."""
        return join_capitalised(captions)


class OnClip(FrozenModel):
    """A model on a pair of CLIP towers.

    Args:
        module: its weights.
        sizes: of the towers.
        variant: of its family.
        vocabulary: sorted CLIP ids that a small model knows; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        sizes: TowerSizes,
        variant: str,
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        self.module = module
        self.sizes = sizes
        self.variant = variant
        self.vocabulary = vocabulary

    def cuts(self, caption: str) -> bool:
        """Whether a text has more tokens than the context, its start and end included."""
        return len(token_ids(caption)) + 2 > self.sizes.context_length

    def header(self) -> dict[str, Any]:
        """What a weights file must say besides its tensors so that it can be built again."""
        return {"sizes": self.sizes.to_json(), "vocabulary": self.vocabulary}


class OnBlip(Padded):
    """A model on towers of BLIP or BLIP-2.

    Args:
        module: its weights.
        sizes: of the towers.
        variant: of its family.
        words: its vocabulary.

    Raises:
        DataError: the vocabulary is another one.
    """

    def __init__(
        self, module: nn.Module, sizes: BlipSizes | FormerSizes, variant: str, words: WordPieces
    ) -> None:
        words.refuse_unfit(sizes.vocab_size)
        self.module = module
        self.sizes = sizes
        self.variant = variant
        self.words = words

    def header(self) -> dict[str, Any]:
        """What a weights file must say besides its tensors so that it can be built again."""
        return {"sizes": self.sizes.to_json(), "words": self.words.words}
