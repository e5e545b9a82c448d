"""CLIP4CIR (Baldrati et al., CVPRW 2022 and CVPR 2022): sum of fine-tuned towers, or a Combiner."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dafm_ray.models.base import RANDOM, ModelId, scratch_sizes, unit
from dafm_ray.models.captions import join_capitalised
from dafm_ray.models.checkpoints import Checkpoint, load_strictly, read_checkpoint
from dafm_ray.models.clip_towers import (
    RN50X4,
    TINY,
    TowerSizes,
    build_towers,
    load_towers,
    tokenize,
    vocabulary_of,
)
from dafm_ray.models.families import OnClip, Padded
from dafm_ray.models.initialisation import seeded

LAYOUTS = ("CLIP", "state_dict.clip")
"""Before the towers' keys: the authors' files and ours, and SPN4CIR's."""


class Combiner(nn.Module):
    """Learned fusion of un-normalised image and text features.

    output = L2(W [text'; image'] + s text + (1 - s) image), s in (0, 1) per query; the
    concatenation order is text, then image.

    Args:
        width: D of both features.
        projection: width each feature is projected to.
        hidden: width of the hidden layers.
    """

    def __init__(self, width: int, projection: int, hidden: int) -> None:
        super().__init__()
        self.text_projection_layer = nn.Linear(width, projection)
        self.image_projection_layer = nn.Linear(width, projection)
        self.combiner_layer = nn.Linear(2 * projection, hidden)
        self.output_layer = nn.Linear(hidden, width)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projection, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, 1),
            nn.Sigmoid(),
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """(B, D), (B, D) -> (B, D), L2-normalised."""
        text_BP = self.dropout(F.relu(self.text_projection_layer(text_BD)))
        image_BP = self.dropout(F.relu(self.image_projection_layer(image_BD)))
        both_B2P = torch.cat([text_BP, image_BP], dim=-1)
        hidden_BH = self.dropout(F.relu(self.combiner_layer(both_B2P)))
        share_B1 = self.dynamic_scalar(both_B2P)
        mixed_BD = share_B1 * text_BD + (1 - share_B1) * image_BD
        return unit(self.output_layer(hidden_BH) + mixed_BD)


class ClipPair(nn.Module):
    """The weights of CLIP4CIR under the names of its checkpoints."""

    def __init__(self, towers: nn.Module, combiner: Combiner | None) -> None:
        super().__init__()
        self.CLIP = towers
        self.Combiner = combiner


class ClipModel(Padded, OnClip):
    """What CLIP4CIR shares with the baselines of one modality."""

    module: ClipPair
    sizes: TowerSizes

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load the authors' files, SPN4CIR's second stage, our own, or random weights."""
        if model_id.weights in RANDOM:
            sizes = TINY if model_id.weights == "random-tiny" else RN50X4
            return cls.random(sizes, model_id.variant)
        checkpoint = read_checkpoint(model_id.weights)
        towers, sizes = towers_of(checkpoint)
        combiner = combiner_of(checkpoint) if model_id.variant == "combiner" else None
        vocabulary = checkpoint.metadata.get("vocabulary")
        return cls(ClipPair(towers, combiner), sizes, model_id.variant, vocabulary)

    @classmethod
    def random(
        cls,
        sizes: TowerSizes,
        variant: str,
        vocabulary: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Self:
        """Randomly initialised weights from a seed."""
        width = sizes.embed_dim
        towers = seeded(seed, lambda: build_towers(sizes))
        combiner = None
        if variant == "combiner":
            combiner = seeded(seed, lambda: Combiner(width, 4 * width, 8 * width))
        return cls(ClipPair(towers, combiner), sizes, variant, vocabulary)

    def encode_images(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), not normalised."""
        features: Tensor = self.module.CLIP.encode_image(images_B3HW)  # type: ignore[operator]
        return features

    def encode_texts(self, texts_B: Sequence[str]) -> Tensor:
        """B texts -> (B, D), not normalised."""
        tokens_BT = tokenize(texts_B, self.sizes.context_length, self.vocabulary)
        return self.encode_tokens(tokens_BT)

    def encode_tokens(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) token ids -> (B, D), not normalised."""
        device = next(self.module.parameters()).device
        features: Tensor = self.module.CLIP.encode_text(tokens_BT.to(device))  # type: ignore[operator]
        return features

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), L2-normalised."""
        return unit(self.encode_images(images_B3HW))


class Clip4Cir(ClipModel):
    """`clip4cir:sum` and `clip4cir:combiner`."""

    variants = ("sum", "combiner")

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `TowerSizes`) and `combiner` (projection, hidden).

        Towers from scratch know the words of the training captions and no others.
        """
        if model_id.weights != "scratch":
            checkpoint = read_checkpoint(model_id.weights)
            towers, sizes = towers_of(checkpoint)
            vocabulary = checkpoint.metadata.get("vocabulary")
        else:
            vocabulary = vocabulary_of([join_capitalised(texts) for texts in captions])
            sizes = scratch_sizes(TowerSizes, scratch, len(vocabulary))
            towers = seeded(seed, lambda: build_towers(sizes))
        combiner = None
        if model_id.variant == "combiner":
            widths = {"projection": 4 * sizes.embed_dim, "hidden": 8 * sizes.embed_dim}
            widths |= scratch.get("combiner", {})
            combiner = seeded(seed, lambda: Combiner(sizes.embed_dim, **widths))
        return cls(ClipPair(towers, combiner), sizes, model_id.variant, vocabulary)

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """Sum: L2(image + text). Combiner: its output. (B, D)."""
        image_BD = self.encode_images(references_R3HW)[reference_index_B]
        return self.fuse(image_BD, self.encode_texts(captions_B))

    def fuse(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """Un-normalised tower features -> L2-normalised query features (B, D)."""
        if self.module.Combiner is not None:
            fused: Tensor = self.module.Combiner(image_BD, text_BD)
            return fused
        return unit(image_BD + text_BD)


def towers_of(checkpoint: Checkpoint) -> tuple[nn.Module, TowerSizes]:
    """Towers from the layouts that `LAYOUTS` names."""
    tensors = checkpoint.section(*LAYOUTS)
    if "sizes" in checkpoint.metadata:
        sizes = checkpoint.recorded_sizes(TowerSizes)
    else:
        sizes = TowerSizes.from_weights(
            tensors, checkpoint.metadata.get("text_heads"), checkpoint.where
        )
    return load_towers(tensors, sizes, checkpoint.where), sizes


def combiner_of(checkpoint: Checkpoint) -> Combiner:
    """The Combiner of a checkpoint, sized from its tensors."""
    tensors = checkpoint.section("Combiner")
    if "output_layer.weight" not in tensors or "text_projection_layer.weight" not in tensors:
        combiner = Combiner(1, 1, 1)
    else:
        width, hidden = tensors["output_layer.weight"].shape
        combiner = Combiner(width, tensors["text_projection_layer.weight"].shape[0], hidden)
    load_strictly(combiner, tensors, checkpoint.where)
    return combiner
