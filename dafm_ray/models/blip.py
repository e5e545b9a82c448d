"""BLIP's towers on transformers' classes: a vision transformer and a text encoder that can attend
to image tokens. Sized from a checkpoint, with the names of the published files renamed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import load_strictly
from dafm_ray.models.initialisation import spread
from dafm_ray.models.renaming import VISION_TRANSFORMER, Rule, layers_below, rename
from dafm_ray.models.torchvision_ops import make_torchvision_importable

HEAD_WIDTH = 64
"""Of published sizes; no state dict says how many heads there are."""


@dataclass(frozen=True)
class BlipSizes:
    """Everything needed to build the towers."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_hidden: int
    text_width: int
    text_layers: int
    text_heads: int
    text_hidden: int
    text_positions: int
    vocab_size: int

    def to_json(self) -> dict[str, int]:
        """Plain values, for a weights file's header."""
        return asdict(self)


BASE = BlipSizes(256, 384, 16, 768, 12, 12, 3072, 768, 12, 12, 3072, 512, 30524)
TINY = BlipSizes(32, 64, 16, 64, 2, 1, 128, 64, 2, 1, 128, 64, 600)

RULES: tuple[Rule, ...] = (
    *VISION_TRANSFORMER,
    (r"visual_encoder\.norm\.(\w+)", r"vision_model.post_layernorm.\1"),
    (r"text_encoder\.embeddings\.position_ids", None),
    (r"temp", "temperature"),
)


class BlipTowers(nn.Module):
    """Vision and text encoders with their projections; weights are random.

    Attributes:
        temperature: learnt in training, kept in checkpoints as `temp`.
    """

    def __init__(self, sizes: BlipSizes, dropout: float = 0.1) -> None:
        super().__init__()
        make_torchvision_importable()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=sizes.vision_hidden,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            layer_norm_eps=1e-6,
            initializer_range=spread(sizes.vision_width),
        )
        text = BlipTextConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=sizes.text_hidden,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=sizes.text_positions,
            layer_norm_eps=1e-12,
            initializer_range=spread(sizes.text_width),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            is_decoder=True,  # builds the cross-attention
            bos_token_id=None,
            sep_token_id=None,
            eos_token_id=None,
        )
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.embed_dim)
        self.text_proj = nn.Linear(sizes.text_width, sizes.embed_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def image_tokens(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + patches, width), the final norm included."""
        tokens: Tensor = self.vision_model(images_B3HW).last_hidden_state
        return tokens

    def image_features(self, tokens_BTW: Tensor) -> Tensor:
        """(B, D), not normalised."""
        features: Tensor = self.vision_proj(tokens_BTW[:, 0])
        return features

    def text_hidden(self, ids_BT: Tensor, mask_BT: Tensor, image_tokens: Tensor | None) -> Tensor:
        """(B, T, width) last hidden state; attends to `image_tokens` (B, P, width) if given."""
        hidden: Tensor = self.text_encoder(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            encoder_hidden_states=image_tokens,
            is_decoder=False,
        ).last_hidden_state
        return hidden


def sizes_of(
    tensors: Mapping[str, Tensor],
    where: str,
    image_size: int | None = None,
    heads: tuple[int, int] | None = None,
) -> BlipSizes:
    """Sizes from the shapes of published tensors.

    Args:
        tensors: published names.
        where: they come from, for messages.
        image_size: if the position embeddings are to be interpolated to another one.
        heads: of the vision and the text encoder; the published width of a head by default.

    Raises:
        DataError: a tensor that says a size is missing.
    """
    try:
        patch = tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
        width = tensors["visual_encoder.cls_token"].shape[-1]
        grid = round((tensors["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        words = tensors["text_encoder.embeddings.word_embeddings.weight"]
        text_width = words.shape[1]
        vision_heads, text_heads = heads or (
            max(width // HEAD_WIDTH, 1),
            max(text_width // HEAD_WIDTH, 1),
        )
        return BlipSizes(
            embed_dim=tensors["vision_proj.weight"].shape[0],
            image_size=image_size or grid * patch,
            patch_size=patch,
            vision_width=width,
            vision_layers=layers_below(tensors, "visual_encoder.blocks."),
            vision_heads=vision_heads,
            vision_hidden=tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            text_width=text_width,
            text_layers=layers_below(tensors, "text_encoder.encoder.layer."),
            text_heads=text_heads,
            text_hidden=tensors["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
            text_positions=tensors["text_encoder.embeddings.position_embeddings.weight"].shape[0],
            vocab_size=words.shape[0],
        )
    except KeyError as error:
        raise DataError(f"{where} holds no BLIP weights: {error} is missing") from None


def load_blip(tensors: Mapping[str, Tensor], sizes: BlipSizes, where: str) -> BlipTowers:
    """Towers with the tensors of a published file.

    Raises:
        DataError: names what does not fit.
    """
    towers = BlipTowers(sizes)
    renamed = renamed_blip(tensors)
    renamed.setdefault("temperature", towers.temperature.detach())
    position = "vision_model.embeddings.position_embedding"
    if position in renamed:
        renamed[position] = resized_positions(
            renamed[position], sizes.image_size // sizes.patch_size
        )
    load_strictly(towers, renamed, where)
    return towers


def renamed_blip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of `BlipTowers`."""
    return rename(tensors, RULES)


def resized_positions(positions_1TW: Tensor, grid: int) -> Tensor:
    """Position embeddings (1, 1 + patches, W) for another grid: bicubic, class token kept."""
    old = round((positions_1TW.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions_1TW
    patches = positions_1TW[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(patches.float(), (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions_1TW[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
