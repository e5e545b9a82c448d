"""SPRC without its Q-Former: the ablation, as we read it.

The paper does not say what stands in for the Q-Former. Here means do: of the image tokens, and of
the embeddings of the words, each with a linear projection into the space of comparison.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from dafm_ray.models.base import unit
from dafm_ray.models.checkpoints import load_strictly
from dafm_ray.models.initialisation import spread
from dafm_ray.models.qformer import FormerSizes, OnImageTokens, QFormerSizes, renamed_qformer


class PooledTokens(OnImageTokens):
    """query = L2(W_i mean(image) + W_t mean(words)), candidate = L2(W_v mean(image)); random but
    for a given vision tower.
    """

    def __init__(self, sizes: FormerSizes, vision: nn.Module | None = None) -> None:
        super().__init__(sizes, vision)
        self.embeddings = nn.Embedding(sizes.vocab_size, sizes.width)
        nn.init.normal_(self.embeddings.weight, std=spread(sizes.width))
        self.image_proj = nn.Linear(sizes.vision_width, sizes.embed_dim, bias=False)
        self.text_proj = nn.Linear(sizes.width, sizes.embed_dim, bias=False)
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.embed_dim, bias=False)

    def candidates(self, image_BPV: Tensor) -> Tensor:
        """(B, P, V) -> (B, 1, D), L2-normalised."""
        return unit(self.vision_proj(image_BPV.mean(1, keepdim=True)))

    def fuse(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, D), L2-normalised."""
        text_BW = self.words(ids_BT, mask_BT)
        return unit(self.image_proj(image_BPV.mean(1)) + self.text_proj(text_BW))

    def words(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, W): mean over the words alone, without [CLS], [SEP] and padding; 0 if there are
        none.
        """
        # As many words as the mask has ones, but for two; they follow [CLS].
        real_BT1 = mask_BT[:, 2:, None]
        words_BTW = self.embeddings(ids_BT[:, 1:-1])
        mean_BW: Tensor = (real_BT1 * words_BTW).sum(1) / real_BT1.sum(1).clamp(min=1)
        return mean_BW


def start_pooled(tensors: Mapping[str, Tensor], sizes: QFormerSizes, where: str) -> PooledTokens:
    """Vision tower and word embeddings of a published file; the projections are random.

    Args:
        tensors: published names.
        sizes: of the file.
        where: they come from, for messages.

    Raises:
        DataError: names what does not fit.
    """
    module = PooledTokens(sizes)
    renamed = renamed_qformer(tensors)
    words = "fusion.embeddings.word_embeddings.weight"
    learnt = {key: value for key, value in renamed.items() if key.startswith("vision_model.")}
    if words in renamed:
        learnt["embeddings.weight"] = renamed[words]
    new = {
        key: value
        for key, value in module.state_dict().items()
        if not key.startswith(("vision_model.", "embeddings."))
    }
    load_strictly(module, {**new, **learnt}, where)
    return module
