"""BLIP4CIR (Liu et al., TMLR 2024: stage 1 of candidate re-ranking) and Bi-BLIP4CIR (Liu et al.,
WACV 2024), both on BLIP's towers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from dafm_ray.models.base import Contrast, ModelId, Terms, scratch_sizes, unit
from dafm_ray.models.blip import (
    BASE,
    TINY,
    BlipSizes,
    BlipTowers,
    load_blip,
    sizes_of,
)
from dafm_ray.models.captions import join_capitalised
from dafm_ray.models.checkpoints import Checkpoint, load_strictly, read_checkpoint
from dafm_ray.models.clip4cir import Combiner, combiner_of
from dafm_ray.models.families import OnBlip
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.wordpieces import ADDED, WordPieces, tiny_vocabulary, words_in

FORWARD, BACKWARD = "[FORWARD]", "[BACKWARD]"
"""Bi-BLIP4CIR's tags of a text that leads from reference to target, and the other way."""

BI_MAX_LENGTH, LONGEST = 77, 512
"""Tokens of a text in Bi-BLIP4CIR, and in any BERT."""

COMBINER = (2560, 5120)
"""Projection and hidden width of Bi-BLIP4CIR's published Combiner."""


class BlipWeights(nn.Module):
    """Towers and, in Bi-BLIP4CIR, a Combiner."""

    def __init__(self, towers: BlipTowers, combiner: Combiner | None = None) -> None:
        super().__init__()
        self.towers = towers
        self.Combiner = combiner


class BlipModel(OnBlip):
    """What both families share."""

    module: BlipWeights
    sizes: BlipSizes

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `BlipSizes` but `vocab_size`)."""
        if model_id.weights != "scratch":
            return cls.load(model_id)
        words = words_in([text for texts in captions for text in texts])
        sizes = scratch_sizes(BlipSizes, scratch, len(words) + len(ADDED))
        combiner = None
        if model_id.variant == "combiner":
            width = sizes.embed_dim
            combiner = seeded(seed, lambda: Combiner(width, 4 * width, 8 * width))
        towers = seeded(seed, lambda: BlipTowers(sizes))
        return cls(BlipWeights(towers, combiner), sizes, model_id.variant, WordPieces(words))

    @classmethod
    def of_our_own(cls, checkpoint: Checkpoint, variant: str) -> Self:
        """Build from a file that a training job of this package wrote."""
        sizes = checkpoint.recorded_sizes(BlipSizes)
        towers = BlipTowers(sizes)
        load_strictly(towers, checkpoint.section("towers"), checkpoint.where)
        combiner = combiner_of(checkpoint) if variant == "combiner" else None
        return cls(
            BlipWeights(towers, combiner),
            sizes,
            variant,
            WordPieces(checkpoint.metadata.get("words")),
        )

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), L2-normalised."""
        towers = self.module.towers
        return unit(towers.image_features(towers.image_tokens(images_B3HW)))

    def tokens(self, texts_B: Sequence[str], max_length: int = LONGEST) -> tuple[Tensor, Tensor]:
        """(B, T) ids and mask on the model's device."""
        device = self.module.towers.temperature.device
        ids_BT, mask_BT = self.words(texts_B, min(max_length, self.sizes.text_positions))
        return ids_BT.to(device), mask_BT.to(device)


class Blip4Cir(BlipModel):
    """`blip4cir:stage1`: the text attends to all tokens of its reference image."""

    variants = ("stage1",)

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load the authors' file (key `BLIP_Retrieval`) or SPN4CIR's second stage."""
        random = random_towers(model_id.weights)
        if random is not None:
            return cls(BlipWeights(random[0]), random[1], model_id.variant, random[2])
        checkpoint = read_checkpoint(model_id.weights)
        if "sizes" in checkpoint.metadata:
            return cls.of_our_own(checkpoint, model_id.variant)
        tensors = checkpoint.section("BLIP_Retrieval", "state_dict.blip", "blip")
        sizes = sizes_of(tensors, checkpoint.where)
        towers = load_blip(tensors, sizes, checkpoint.where)
        return cls(
            BlipWeights(towers),
            sizes,
            model_id.variant,
            WordPieces(checkpoint.metadata.get("words")),
        )

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """L2(text_proj(first token)) of the text encoder with cross-attention, (B, D)."""
        tokens_RPW = self.module.towers.image_tokens(references_R3HW)
        ids_BT, mask_BT = self.tokens(captions_B)
        ids_BT[:, 0] = self.words.encoder_token
        return self.fuse(tokens_RPW[reference_index_B], ids_BT, mask_BT)

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """In-batch contrast with the learnt temperature."""
        scale = 1 / self.module.towers.temperature
        plain = super().terms(references_B3HW, captions_B, targets_B3HW, logit_scale, weights)
        return Terms({"rank": replace(plain.contrasts["rank"], scale=scale)})

    def fuse(self, image_tokens_BPW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Reference tokens and a text that begins with `[ENC]` -> (B, D)."""
        hidden_BTW = self.module.towers.text_hidden(ids_BT, mask_BT, image_tokens_BPW)
        return unit(self.module.towers.text_proj(hidden_BTW[:, 0]))


class BiBlip4Cir(BlipModel):
    """`biblip4cir:sum` and `biblip4cir:combiner`: image and text apart, then fused."""

    variants = ("sum", "combiner")
    loss_weights: ClassVar[Mapping[str, float]] = {"reversed": 1.0}

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load `model_base.pth+tuned_blip.pt` and, for the Combiner, `+combiner.pt`."""
        combined = model_id.variant == "combiner"
        random = random_towers(model_id.weights)
        if random is not None:
            width = random[1].embed_dim
            combiner = seeded(0, lambda: Combiner(width, *COMBINER)) if combined else None
            return cls(BlipWeights(random[0], combiner), random[1], model_id.variant, random[2])
        checkpoint = read_checkpoint(model_id.weights)
        if "sizes" in checkpoint.metadata:
            return cls.of_our_own(checkpoint, model_id.variant)
        return cls.of_checkpoint(checkpoint, model_id.variant)

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint,
        variant: str,
        image_size: int = BASE.image_size,
        heads: tuple[int, int] | None = None,
    ) -> Self:
        """Build from the three parts; the image tower's positions are resized to `image_size`."""
        image = checkpoint.section("BLIPImgEncoder", "model")
        kept = ("visual_encoder.", "vision_proj.")
        tensors = {key: value for key, value in image.items() if key.startswith(kept)}
        tensors |= checkpoint.section("BLIPTextEncoder")
        sizes = sizes_of(tensors, checkpoint.where, image_size, heads)
        towers = load_blip(tensors, sizes, checkpoint.where)
        combiner = combiner_of(checkpoint) if variant == "combiner" else None
        return cls(
            BlipWeights(towers, combiner),
            sizes,
            variant,
            WordPieces(checkpoint.metadata.get("words")),
        )

    def caption(self, captions: Sequence[str]) -> str:
        """Joined as CLIP4CIR does, then `[FORWARD]` before every chunk between "and"."""
        return tagged(join_capitalised(captions), FORWARD)

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """Sum: L2(image + text). Combiner: its output. (B, D)."""
        image_RD = self.image_features(references_R3HW)
        return self.fuse(image_RD[reference_index_B], self.text_features(captions_B))

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        """(B, D), not normalised."""
        towers = self.module.towers
        return towers.image_features(towers.image_tokens(images_B3HW))

    def text_features(self, captions_B: Sequence[str]) -> Tensor:
        """(B, D), not normalised."""
        towers = self.module.towers
        ids_BT, mask_BT = self.tokens(captions_B, BI_MAX_LENGTH)
        features_BD: Tensor = towers.text_proj(towers.text_hidden(ids_BT, mask_BT, None)[:, 0])
        return features_BD

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """In-batch contrast, and the same task backwards among this worker's batch."""
        references_BD = self.image_features(references_B3HW)
        targets_BD = self.image_features(targets_B3HW)
        queries_BD = self.fuse(references_BD, self.text_features(captions_B))
        contrasts = {"rank": Contrast(1.0, logit_scale, queries_BD, unit(targets_BD))}
        weight = weights["reversed"]
        if not weight:
            return Terms(contrasts)
        backward_BD = self.text_features(
            [caption.replace(FORWARD, BACKWARD) for caption in captions_B]
        )
        scores_BB = logit_scale * self.reversed_scores(references_BD, backward_BD, targets_BD)
        own_B = torch.arange(len(scores_BB), device=scores_BB.device)
        return Terms(contrasts, {"reversed": (weight, F.cross_entropy(scores_BB, own_B))})

    def reversed_scores(
        self, references_BD: Tensor, backward_BD: Tensor, targets_BD: Tensor
    ) -> Tensor:
        """Which target, changed back by a query's text, is the query's reference?

        Args:
            references_BD: image features, not normalised, as all three.
            backward_BD: text features under the `[BACKWARD]` tag.
            targets_BD: image features; without a Combiner they are normalised before the sum.

        Returns:
            (B, B): row b fuses text b with every target and compares with reference b.
        """
        if self.module.Combiner is None:
            targets_BD = unit(targets_BD)

        def row(reference_D: Tensor, text_D: Tensor) -> Tensor:
            return self.fuse(targets_BD, text_D.expand_as(targets_BD)) @ reference_D

        # A row at a time, computed again for its gradient: all pairs at once would not fit.
        rows = zip(unit(references_BD), backward_BD, strict=True)
        return torch.stack([recomputed(row, *pair, use_reentrant=False) for pair in rows])

    def fuse(self, image_BD: Tensor, text_BD: Tensor) -> Tensor:
        """Un-normalised features -> L2-normalised query features (B, D)."""
        if self.module.Combiner is not None:
            fused: Tensor = self.module.Combiner(image_BD, text_BD)
            return fused
        return unit(image_BD + text_BD)


def tagged(text: str, tag: str) -> str:
    """Bi-BLIP4CIR's texts: the tag before every chunk after splitting on the substring "and"."""
    return "and".join(f" {tag} {chunk}" for chunk in text.split("and"))


def random_towers(weights: str) -> tuple[BlipTowers, BlipSizes, WordPieces] | None:
    """Random towers of the published or of a tiny size, for tests; None for weights of a file."""
    if weights == "random":
        return seeded(0, lambda: BlipTowers(BASE)), BASE, WordPieces()
    if weights == "random-tiny":
        words = tiny_vocabulary(TINY.vocab_size)
        return seeded(0, lambda: BlipTowers(TINY)), TINY, WordPieces(words)
    return None
