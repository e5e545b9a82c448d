"""TG-CIR (Wen et al., ACM MM 2023): global and local tokens of image and text, fused by a gate a
token; also its second stage in SPN4CIR, whose text side has token modules of its own.

Written from the paper and from measured numbers; the published code is GPL-3 and was not used.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dafm_ray.models.base import Contrast, ModelId, Terms, scratch_sizes, unit
from dafm_ray.models.captions import join_plain
from dafm_ray.models.checkpoints import load_strictly, read_checkpoint
from dafm_ray.models.clip_towers import (
    SIZE_BUFFERS,
    TowerSizes,
    build_towers,
    tokenize,
    vocabulary_of,
)
from dafm_ray.models.families import OnClip
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.preprocess import no_pad, to_tensor

GLOBAL, LOCAL = 4, 8
"""Tokens of a published model; a file's own numbers are read off it."""

VIT_B16 = TowerSizes(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12)
TINY = TowerSizes(32, 64, 2, 64, 16, 77, 49408, 64, 1, 2)

_ALIAS = "backbone.image_backbone."
"""The vision tower stands under a second name in published files."""


class TokenLearner(nn.Module):
    """Local tokens: each the mean over positions of the features times a learnt sigmoid map."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.tokenizers = nn.ModuleList(_Tokenizer(width) for _ in range(tokens))

    def forward(self, positions_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, L, D)."""
        features_BDT = positions_BTD.transpose(1, 2)
        tokens = [
            (tokenizer(features_BDT) * features_BDT).mean(-1) for tokenizer in self.tokenizers
        ]
        return torch.stack(tokens, dim=1)


class _Tokenizer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(width, 1, 1), nn.Sigmoid())

    def forward(self, features_BDT: Tensor) -> Tensor:
        weights: Tensor = self.conv(features_BDT)
        return weights


class Backbone(nn.Module):
    """Towers and what makes tokens of them, under the names of published files."""

    def __init__(self, sizes: TowerSizes, tokens: tuple[int, int], text_side: bool) -> None:
        super().__init__()
        width = sizes.embed_dim
        self.clip: Any = build_towers(sizes)
        self.tokenlearn = TokenLearner(width, tokens[1])
        self.fc = nn.Linear(sizes.vision_width, width)
        self.text_fc = nn.Linear(sizes.text_width, width)
        self.masks = nn.Embedding(tokens[0], width)
        self.tokenlearn_text = TokenLearner(width, tokens[1]) if text_side else None
        self.masks_text = nn.Embedding(tokens[0], width) if text_side else None

    def image_tokens(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P + L, D); local tokens see the last block, before its norm."""
        found = self.clip.visual.forward_intermediates(
            images_B3HW, indices=1, output_fmt="NLC", output_extra_tokens=True
        )
        patches, first = found["image_intermediates"][0], found["image_intermediates_prefix"][0]
        hidden_BTV = torch.cat([first, patches], dim=1)
        local_BLD = self.tokenlearn(self.fc(hidden_BTV))
        return torch.cat([_masked(found["image_features"], self.masks), local_BLD], dim=1)

    def text_tokens(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) ids -> (B, P + L, D); local tokens see all positions after the final norm."""
        found = self.clip.forward_intermediates(
            text=tokens_BT, text_indices=1, normalize=False, normalize_intermediates=True
        )
        learn = self.tokenlearn if self.tokenlearn_text is None else self.tokenlearn_text
        masks = self.masks if self.masks_text is None else self.masks_text
        local_BLD = learn(self.text_fc(found["text_intermediates"][0]))
        return torch.cat([_masked(found["text_features"], masks), local_BLD], dim=1)


def _masked(features_BD: Tensor, masks: nn.Embedding) -> Tensor:
    """Global tokens: the feature times each mask, clipped at zero. (B, P, D)."""
    return features_BD[:, None] * F.relu(masks.weight)


class Gate(nn.Sequential):
    """A share in (0, 1) a token, from two tokens side by side."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def share(self, one_BKD: Tensor, other_BKD: Tensor) -> Tensor:
        """(B, K, D) twice -> (B, K, 1)."""
        return torch.sigmoid(self(torch.cat([one_BKD, other_BKD], dim=-1)))


class TgCirWeights(nn.Module):
    """All weights, under the names of published files."""

    def __init__(
        self, sizes: TowerSizes, tokens: tuple[int, int] = (GLOBAL, LOCAL), text_side: bool = False
    ) -> None:
        super().__init__()
        self.backbone = Backbone(sizes, tokens, text_side)
        self.s_remain_map = Gate(sizes.embed_dim)
        self.t_remain_map = Gate(sizes.embed_dim)
        self.t_replace_map = Gate(sizes.embed_dim)
        self.local_weight = nn.Parameter(torch.ones(sum(tokens)))
        self.loss_T = None if text_side else nn.Parameter(torch.tensor([10.0]))


class TgCir(OnClip):
    """`tgcir:base`, and `tgcir:spn` for files of SPN4CIR's second stage."""

    variants = ("base", "spn")
    loss_weights: ClassVar[Mapping[str, float]] = {
        "student": 1.0,
        "teacher": 1.0,
        "mask": 1.0,
        "ortho": 0.1,
        "ckd": 10.0,
        "kl": 0.5,
        "tau": 0.1,
    }
    module: TgCirWeights

    @classmethod
    def load(cls, model_id: ModelId) -> Self:
        """Load a file whose tensors stand under `state_dict`, our own, or random weights."""
        spn = model_id.variant == "spn"
        if model_id.weights in ("random", "random-tiny"):
            sizes = TINY if model_id.weights == "random-tiny" else VIT_B16
            module = seeded(0, lambda: TgCirWeights(sizes, text_side=spn))
            return cls(module, sizes, model_id.variant)
        checkpoint = read_checkpoint(model_id.weights)
        tensors = published(checkpoint.tensors)
        clip = _below(tensors, "backbone.clip.")
        if "sizes" in checkpoint.metadata:
            sizes = checkpoint.recorded_sizes(TowerSizes)
        else:
            sizes = TowerSizes.from_weights(clip, where=checkpoint.where)
        module = load_tgcir(tensors, sizes, spn, checkpoint.where)
        return cls(module, sizes, model_id.variant, checkpoint.metadata.get("vocabulary"))

    @classmethod
    def start(
        cls,
        model_id: ModelId,
        scratch: Mapping[str, Any],
        captions: Sequence[Sequence[str]],
        seed: int,
    ) -> Self:
        """`scratch` holds `towers` (fields of `TowerSizes`); weights of a file go on learning."""
        if model_id.weights != "scratch":
            return cls.load(model_id)
        vocabulary = vocabulary_of([join_plain(texts) for texts in captions])
        sizes = scratch_sizes(TowerSizes, scratch, len(vocabulary))
        spn = model_id.variant == "spn"
        module = seeded(seed, lambda: TgCirWeights(sizes, text_side=spn))
        return cls(module, sizes, model_id.variant, vocabulary)

    def preprocess(self, image: Image.Image) -> Tensor:
        """RGB first, then CLIP's own transform, without padding."""
        return to_tensor(image.convert("RGB"), self.sizes.image_size, no_pad)

    def caption(self, captions: Sequence[str]) -> str:
        """Punctuation to blanks, lower case, joined with " and "."""
        return join_plain(captions)

    def encode_gallery(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D): L2 of the mean of the image's tokens."""
        return unit(self.module.backbone.image_tokens(images_B3HW).mean(1))

    def encode_queries(
        self, references_R3HW: Tensor, reference_index_B: Tensor, captions_B: Sequence[str]
    ) -> Tensor:
        """(B, D): L2 of the mean of the fused tokens."""
        device = self.module.local_weight.device
        tokens_BT = tokenize(captions_B, self.sizes.context_length, self.vocabulary).to(device)
        reference_RKD = self.module.backbone.image_tokens(references_R3HW)
        text_BKD = self.module.backbone.text_tokens(tokens_BT)
        fused_BKD = self.fuse(reference_RKD[reference_index_B], text_BKD)
        return unit(fused_BKD.mean(1))

    def fuse(self, reference_BKD: Tensor, text_BKD: Tensor) -> Tensor:
        """A share of the reference and the rest of the text, token by token: (B, K, D)."""
        share_BK1 = self.module.s_remain_map.share(reference_BKD, text_BKD)
        return share_BK1 * reference_BKD + (1 - share_BK1) * text_BKD

    def terms(
        self,
        references_B3HW: Tensor,
        captions_B: Sequence[str],
        targets_B3HW: Tensor,
        logit_scale: float,
        weights: Mapping[str, float],
    ) -> Terms:
        """The six terms of the paper; see `token_terms`."""
        device = self.module.local_weight.device
        tokens_BT = tokenize(captions_B, self.sizes.context_length, self.vocabulary).to(device)
        backbone = self.module.backbone
        return self.token_terms(
            backbone.image_tokens(references_B3HW),
            backbone.text_tokens(tokens_BT),
            backbone.image_tokens(targets_B3HW),
            weights,
        )

    def token_terms(
        self, r_BKD: Tensor, m_BKD: Tensor, t_BKD: Tensor, weights: Mapping[str, float]
    ) -> Terms:
        """A student that sees reference and text learns from a teacher that also sees the target.

        Args:
            r_BKD: tokens of the reference.
            m_BKD: of the modification text.
            t_BKD: of the target.
            weights: as `loss_weights`.
        """
        module = self.module
        scale = logit_scale_of(module)
        a = module.s_remain_map.share(r_BKD, m_BKD)
        p = module.t_remain_map.share(r_BKD.detach(), t_BKD)
        q = module.t_replace_map.share(m_BKD.detach(), t_BKD)
        student_BD = F.normalize((a * r_BKD + (1 - a) * m_BKD).mean(1), dim=-1)
        target_BD = F.normalize(t_BKD.mean(1), dim=-1)
        teacher_BE, flat_BE = self._flat(p * r_BKD + q * m_BKD), self._flat(t_BKD)
        distilled = F.mse_loss(a, p.detach()) + F.mse_loss(1 - a, q.detach())
        similar_BB = F.normalize(flat_BE, dim=-1) @ F.normalize(flat_BE, dim=-1).T
        spread = F.kl_div(
            F.log_softmax(student_BD @ target_BD.T / weights["tau"], dim=-1),
            F.softmax(similar_BB / weights["tau"], dim=-1),
            reduction="batchmean",
        )
        apart = sum(_orthogonality(tokens) for tokens in (r_BKD, t_BKD, m_BKD)) / 3
        return Terms(
            {
                "student": Contrast(weights["student"], scale, student_BD, target_BD),
                "teacher": Contrast(weights["teacher"], scale, teacher_BE, flat_BE),
            },
            {
                "mask": (weights["mask"], F.mse_loss(p + q, torch.ones_like(p))),
                "ortho": (weights["ortho"], torch.as_tensor(apart)),
                "ckd": (weights["ckd"], distilled),
                "kl": (weights["kl"], spread),
            },
        )

    def _flat(self, tokens_BKD: Tensor) -> Tensor:
        """Tokens normalised one by one, weighted, side by side: (B, K x D)."""
        weighted = F.normalize(tokens_BKD, dim=-1) * self.module.local_weight[:, None]
        return weighted.flatten(1)


def logit_scale_of(module: TgCirWeights) -> Tensor:
    """The learnt factor on scores; SPN4CIR's second stage keeps none."""
    return module.local_weight.new_tensor([10.0]) if module.loss_T is None else module.loss_T


def _orthogonality(tokens_BKD: Tensor) -> Tensor:
    """How far the tokens of an item are from pointing in different directions."""
    unit_BKD = F.normalize(tokens_BKD, dim=-1)
    cosine_BKK = unit_BKD @ unit_BKD.transpose(1, 2)
    eye_KK = torch.eye(cosine_BKK.shape[1], device=cosine_BKK.device)
    return F.mse_loss(cosine_BKK, eye_KK.expand_as(cosine_BKK))


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published file without its outer key, aliases and sizes."""
    found = _below(tensors, "state_dict.") or dict(tensors)
    return {
        key: tensor
        for key, tensor in found.items()
        if not key.startswith(_ALIAS) and key.rpartition(".")[2] not in SIZE_BUFFERS
    }


def load_tgcir(
    tensors: Mapping[str, Tensor], sizes: TowerSizes, text_side: bool, where: str
) -> TgCirWeights:
    """Weights of a published file.

    Raises:
        DataError: names what does not fit.
    """
    masks = tensors.get("backbone.masks.weight")
    local = {key.split(".")[3] for key in tensors if key.startswith("backbone.tokenlearn.")}
    tokens = (len(masks) if masks is not None else GLOBAL, len(local) or LOCAL)
    module = TgCirWeights(sizes, tokens, text_side)
    load_strictly(module, tensors, where)
    return module


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: tensor for k, tensor in tensors.items() if k.startswith(prefix)}
