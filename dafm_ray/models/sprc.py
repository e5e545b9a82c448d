"""SPRC (Bai et al., ICLR 2024): sentence-level prompts from a Q-Former; also its second stage in
SPN4CIR (Feng et al., ACM MM 2024), whose query side has weights of its own.

A candidate is 32 vectors; a query's score is its best dot product with them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dafm_ray.models.base import Contrast, ModelId, Terms, scratch_sizes, unit
from dafm_ray.models.checkpoints import load_strictly, read_checkpoint
from dafm_ray.models.families import OnBlip
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.qformer import (
    EVA_G,
    TINY,
    PromptedQFormer,
    QFormerSizes,
    load_qformer,
    sizes_of,
)
from dafm_ray.models.wordpieces import ADDED, WordPieces, tiny_vocabulary, words_in

AUTHORS_KEY = "Blip2QformerCirAlignPrompt"
TEXT_LENGTH = 32
SCORES_AT_ONCE = 1 << 22
"""Dot products held before their maximum is taken, per block of candidates."""


class Sprc(OnBlip):
    """`sprc:base`, and `sprc:spn` for files of SPN4CIR's second stage."""

    variants = ("base", "spn")
    loss_weights: ClassVar[Mapping[str, float]] = {"itc": 1.0, "rtc": 0.4, "align": 0.4}
    module: PromptedQFormer
    sizes: QFormerSizes

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load the authors' file (key `Blip2QformerCirAlignPrompt`) or SPN4CIR's (`blip_model`)."""
        spn = model_id.variant == "spn"
        if model_id.weights == "random":
            module = seeded(0, lambda: PromptedQFormer(EVA_G, spn))
            return cls(module, EVA_G, model_id.variant, WordPieces())
        if model_id.weights == "random-tiny":
            words = WordPieces(tiny_vocabulary(TINY.vocab_size))
            return cls(seeded(0, lambda: PromptedQFormer(TINY, spn)), TINY, model_id.variant, words)
        checkpoint = read_checkpoint(model_id.weights)
        if "sizes" in checkpoint.metadata:
            own = checkpoint.recorded_sizes(QFormerSizes)
            module = PromptedQFormer(own, spn)
            load_strictly(module, checkpoint.tensors, checkpoint.where)
            return cls(module, own, model_id.variant, WordPieces(checkpoint.metadata.get("words")))
        tensors = checkpoint.section("state_dict.blip_model" if spn else AUTHORS_KEY)
        sizes = sizes_of(tensors, checkpoint.where)
        module = load_qformer(tensors, sizes, checkpoint.where)
        return cls(module, sizes, model_id.variant, WordPieces(checkpoint.metadata.get("words")))

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `QFormerSizes` but `vocab_size`) and, if the vision
        tower shall not start from nothing, `vision`: a weights file of BLIP or BLIP-2 training.
        """
        if model_id.weights != "scratch":
            return cls.load(model_id)
        words = words_in([text for texts in captions for text in texts])
        vocab_size = len(words) + len(ADDED)
        sizes = scratch_sizes(QFormerSizes, scratch, vocab_size)
        module = seeded(seed, lambda: PromptedQFormer(sizes, model_id.variant == "spn"))
        if "vision" in scratch:
            learnt = read_checkpoint(scratch["vision"])
            tower = learnt.section("towers.vision_model", "vision_model")
            load_strictly(module.vision_model, tower, learnt.where)
        return cls(module, sizes, model_id.variant, WordPieces(words))

    def tokens(self, texts_B: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, 32) ids and mask on the model's device."""
        device = self.module.temperature.device
        ids_BT, mask_BT = self.words(texts_B, pad_to=TEXT_LENGTH)
        return ids_BT.to(device), mask_BT.to(device)

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32, D), each vector L2-normalised."""
        image_BPV = self.module.image_tokens(images_B3HW)
        queries_BQW = self.module.query_tokens.expand(len(image_BPV), -1, -1)
        hidden_BQW = self.module.fusion.of_image(queries_BQW, image_BPV)
        return unit(self.module.vision_proj(hidden_BQW))

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D), L2-normalised; see `fuse`."""
        ids_BT, mask_BT = self.tokens(captions_B)
        image_RPV = self.module.image_tokens(references_R3HW)
        return self.fuse(image_RPV[reference_index_B], ids_BT, mask_BT)

    def fuse(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pass 1 turns reference and text into prompts; pass 2 reads prompts and text, no image."""
        return self.read(self.prompts(image_BPV, ids_BT, mask_BT), ids_BT, mask_BT)

    def read(self, prompts_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pass 2: (B, D), L2-normalised."""
        side = self.module.text
        former = self.module.fusion if side is None else side
        project = self.module.text_proj if side is None else side.proj
        hidden_BLW = former.without_image(prompts_BQW, ids_BT, mask_BT)
        return unit(project(hidden_BLW[:, self.sizes.queries]))

    def prompts(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, 32, W): the sentence-level prompts of pass 1."""
        queries_BQW = self.module.query_tokens.expand(len(image_BPV), -1, -1)
        hidden_BLW = self.module.fusion.with_image(queries_BQW, image_BPV, ids_BT, mask_BT)
        return hidden_BLW[:, : self.sizes.queries]

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """itc: query to target. rtc: the same with a text-only query, whose learnt prompts stand
        after its first token. align: the prompts of pass 1 towards the learnt ones.
        """
        module, scale = self.module, 1 / self.module.temperature
        ids_BT, mask_BT = self.tokens(captions_B)
        image_BPV = module.image_tokens(references_B3HW)
        candidates = self.encode_gallery(targets_B3HW)
        prompts_BQW = self.prompts(image_BPV, ids_BT, mask_BT)
        learnt_BQW = module.prompt_tokens.expand(len(ids_BT), -1, -1)
        hidden_BLW = module.fusion.prompted_text(learnt_BQW, ids_BT, mask_BT)
        text_BD = unit(module.text_proj(hidden_BLW[:, 0]))
        queries = self.read(prompts_BQW, ids_BT, mask_BT)
        drift = F.mse_loss(prompts_BQW.mean(1), learnt_BQW.detach().mean(1))
        return Terms(
            {
                "itc": Contrast(weights["itc"], scale, queries, candidates),
                "rtc": Contrast(weights["rtc"], scale, text_BD, candidates),
            },
            {"align": (weights["align"], drift)},
        )

    @staticmethod
    def score(query_features: Tensor, gallery_features: Tensor) -> Tensor:
        """Maximum over its 32 vectors of the dot product: (Q, D), (N, 32, D) -> (Q, N).

        Candidates are taken in blocks, so memory never holds 32 x N a query.
        """
        vectors = gallery_features.shape[1]
        step = max(1, SCORES_AT_ONCE // (max(1, len(query_features)) * vectors))
        blocks = [
            (query_features @ part.flatten(0, 1).T).view(len(query_features), -1, vectors).amax(-1)
            for part in torch.split(gallery_features, step)
        ]
        return torch.cat(blocks, dim=1)
