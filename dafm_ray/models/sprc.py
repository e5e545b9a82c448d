"""SPRC (Bai et al., ICLR 2024): sentence-level prompts from a Q-Former; also its second stage in
SPN4CIR (Feng et al., ACM MM 2024), whose query side has weights of its own.

A candidate is 32 vectors; a query's score is its best dot product with them. The vision tower
is BLIP-2's or that of any CLIP model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dafm_ray.errors import DataError
from dafm_ray.models.base import RANDOM, Contrast, ModelId, Terms, scratch_sizes, unit
from dafm_ray.models.checkpoints import Checkpoint, load_strictly, read_checkpoint
from dafm_ray.models.clip_vision import HEADER, ClipVision, ClipVisionConfig, learnt_vision
from dafm_ray.models.families import OnBlip
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.pooled import PooledTokens, start_pooled
from dafm_ray.models.qformer import (
    EVA_G,
    TINY,
    FormerSizes,
    PromptedQFormer,
    QFormerSizes,
    load_qformer,
    new_tokens,
    sizes_of,
)
from dafm_ray.models.wordpieces import ADDED, WordPieces, tiny_vocabulary, words_in

AUTHORS_KEY = "Blip2QformerCirAlignPrompt"
BLIP2_KEY = "model"
TEXT_LENGTH = 32
_OF_VISION = ("image_size", "patch_size", "vision_")
SCORES_AT_ONCE = 1 << 22
"""Dot products held before their maximum is taken, per block of candidates."""


class Sprc(OnBlip):
    """`sprc:base`; `sprc:spn` for files of SPN4CIR's second stage; `sprc:pooled` without Q-Former.

    Of `loss_weights`, `sprc:pooled` has itc alone.
    """

    variants = ("base", "spn", "pooled")
    loss_weights: ClassVar[Mapping[str, float]] = {"itc": 1.0, "rtc": 0.4, "align": 0.4}
    module: PromptedQFormer | PooledTokens
    sizes: FormerSizes

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load the authors' file (key `Blip2QformerCirAlignPrompt`), SPN4CIR's (`blip_model`) or
        our own.
        """
        if model_id.weights == "random":
            return cls.random(EVA_G, model_id.variant, WordPieces())
        if model_id.weights == "random-tiny":
            words = WordPieces(tiny_vocabulary(TINY.vocab_size))
            return cls.random(TINY, model_id.variant, words)
        return cls.of_checkpoint(read_checkpoint(model_id.weights), model_id.variant)

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `QFormerSizes` but `vocab_size`) and, if the vision
        tower shall not start from nothing, `vision`: a weights file of BLIP, BLIP-2 or CLIP4CIR
        training, or `architecture/pretrained` of open_clip. Such a tower brings its own sizes, and
        `towers` need not repeat them.

        Weights may be BLIP-2's own file; what it lacks is random then.
        """
        if model_id.weights in RANDOM:
            return cls.load(model_id)
        if model_id.weights != "scratch":
            return cls.of_checkpoint(read_checkpoint(model_id.weights), model_id.variant, seed)
        words = words_in([text for texts in captions for text in texts])
        vocab_size = len(words) + len(ADDED)
        learnt = learnt_vision(scratch["vision"]) if "vision" in scratch else None
        if isinstance(learnt, ClipVision):
            own = {"image_size": learnt.image_size, "vision_width": learnt.width}
            sizes = scratch_sizes(FormerSizes, scratch, vocab_size, own)
            return cls.random(sizes, model_id.variant, WordPieces(words), learnt, seed)
        if learnt is None:
            new = scratch_sizes(QFormerSizes, scratch, vocab_size)
            return cls.random(new, model_id.variant, WordPieces(words), seed=seed)
        tower = learnt.section("towers.vision_model", "vision_model")
        recorded = learnt.metadata.get("sizes", {})
        own = {key: value for key, value in recorded.items() if key.startswith(_OF_VISION)}
        new = scratch_sizes(QFormerSizes, scratch, vocab_size, own)
        model = cls.random(new, model_id.variant, WordPieces(words), seed=seed)
        load_strictly(model.module.vision_model, tower, learnt.where)
        return model

    @classmethod
    def random(
        cls,
        sizes: FormerSizes,
        variant: str,
        words: WordPieces,
        vision: ClipVision | None = None,
        seed: int = 0,
    ) -> Self:
        """Random weights from a seed, but for a given vision tower."""

        def build() -> PromptedQFormer | PooledTokens:
            if variant == "pooled":
                return PooledTokens(sizes, vision)
            return PromptedQFormer(sizes, variant == "spn", vision)

        return cls(seeded(seed, build), sizes, variant, words)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, variant: str, seed: int | None = None) -> Self:
        """The model of weights files.

        Args:
            checkpoint: of the authors, of SPN4CIR, of BLIP-2 or our own.
            variant: of this family.
            seed: of what BLIP-2's own file lacks; None refuses such a file.

        Raises:
            DataError: the weights do not fit.
        """
        words = WordPieces(checkpoint.metadata.get("words"))
        if "sizes" in checkpoint.metadata:
            vision = None
            kind: type[FormerSizes] = QFormerSizes
            if HEADER in checkpoint.metadata:
                vision = ClipVision(checkpoint.recorded_sizes(ClipVisionConfig, HEADER))
                kind = FormerSizes
            model = cls.random(checkpoint.recorded_sizes(kind), variant, words, vision)
            load_strictly(model.module, checkpoint.tensors, checkpoint.where)
            return model
        if variant == "spn":
            tensors = checkpoint.section("state_dict.blip_model")
        else:
            tensors = published_tensors(checkpoint)
        sizes = sizes_of(tensors, checkpoint.where)
        if variant == "pooled" or "prompt_tokens" not in tensors:
            if seed is None:
                lack = "projections of means" if variant == "pooled" else "prompt tokens"
                raise DataError(
                    f"{checkpoint.where} has no {lack}: it was not trained as sprc:{variant}; "
                    f"fine-tune it first, with model: sprc:{variant}@{checkpoint.where}"
                )
            if variant == "pooled":
                pooled = seeded(seed, lambda: start_pooled(tensors, sizes, checkpoint.where))
                return cls(pooled, sizes, variant, words)
            tensors["prompt_tokens"] = seeded(seed, lambda: new_tokens(sizes))
        return cls(load_qformer(tensors, sizes, checkpoint.where), sizes, variant, words)

    def header(self) -> dict[str, Any]:
        """What a weights file must say besides its tensors so that it can be built again."""
        vision = self.module.vision_model
        own = {HEADER: vision.config.to_json()} if isinstance(vision, ClipVision) else {}
        return {**super().header(), **own}

    def preprocess(self, image: Image.Image) -> Tensor:
        """As the vision tower was trained: open_clip's towers as open_clip does, others padded."""
        vision = self.module.vision_model
        if isinstance(vision, ClipVision) and vision.config.preprocess is not None:
            return vision.preprocess(image)
        return super().preprocess(image)

    def tokens(self, texts_B: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, 32) ids and mask on the model's device."""
        device = self.module.temperature.device
        ids_BT, mask_BT = self.words(texts_B, pad_to=TEXT_LENGTH)
        return ids_BT.to(device), mask_BT.to(device)

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32, D), each vector L2-normalised; (B, 1, D) without Q-Former."""
        return self.module.candidates(self.module.image_tokens(images_B3HW))

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D), L2-normalised."""
        ids_BT, mask_BT = self.tokens(captions_B)
        image_RPV = self.module.image_tokens(references_R3HW)
        return self.module.fuse(image_RPV[reference_index_B], ids_BT, mask_BT)

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
        if isinstance(module, PooledTokens):
            queries = module.fuse(image_BPV, ids_BT, mask_BT)
            return Terms({"itc": Contrast(weights["itc"], scale, queries, candidates)})
        prompts_BQW = module.prompts(image_BPV, ids_BT, mask_BT)
        learnt_BQW = module.prompt_tokens.expand(len(ids_BT), -1, -1)
        hidden_BLW = module.fusion.prompted_text(learnt_BQW, ids_BT, mask_BT)
        text_BD = unit(module.text_proj(hidden_BLW[:, 0]))
        queries = module.read(prompts_BQW, ids_BT, mask_BT)
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


_PUBLISHED = (
    *("visual_encoder.", "ln_vision.", "Qformer.", "query_tokens", "prompt_tokens"),
    *("vision_proj.", "text_proj.", "itm_head.", "temp"),
)
_EVA = ("blocks.", "patch_embed.", "cls_token", "pos_embed")


def published_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors of the authors' file, or of BLIP-2's own.

    BLIP-2's lie under `model`, or bare. Its vision tower may lie in EVA's file, bare too and
    without the tower's name; BLIP-2 leaves out what comes after its 39th block.

    Raises:
        DataError: it is no such file, or one without vision tower.
    """
    if "query_tokens" in checkpoint.tensors:
        tensors = {k: t for k, t in checkpoint.tensors.items() if k.startswith(_PUBLISHED)}
    else:
        tensors = checkpoint.section(AUTHORS_KEY, BLIP2_KEY)
    for key, tensor in checkpoint.tensors.items():
        block = key.split(".")[1] if key.startswith("blocks.") else "0"
        if key.startswith(_EVA) and int(block) < EVA_G.vision_layers:
            tensors.setdefault(f"visual_encoder.{key}", tensor)
    if "query_tokens" in tensors and "visual_encoder.cls_token" not in tensors:
        raise DataError(
            f"{checkpoint.where} holds no vision tower; add its file, as in "
            "blip2_pretrained.pth+eva_vit_g.pth"
        )
    return tensors
