"""BLIP-2's vision tower and Q-Former on transformers' classes, with SPRC's prompt tokens.

Two details of transformers' classes make the numbers silently wrong and are set here: the norm
after the vision tower has eps 1e-5 where the class takes the tower's 1e-6, and a pass without an
image runs every position through the text feed-forward (`query_length=0`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import load_strictly
from dafm_ray.models.initialisation import spread
from dafm_ray.models.renaming import VISION_TRANSFORMER, Rule, layers_below, rename
from dafm_ray.models.torchvision_ops import make_torchvision_importable

LN_VISION_EPS = 1e-5
EVA_HEAD_WIDTH, QFORMER_HEAD_WIDTH = 88, 64
"""Of published sizes; no state dict says how many heads there are."""


@dataclass(frozen=True)
class QFormerSizes:
    """Everything needed to build the vision tower and the Q-Former."""

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_hidden: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int
    vocab_size: int
    queries: int

    def to_json(self) -> dict[str, int]:
        """Plain values, for a weights file's header."""
        return asdict(self)


EVA_G = QFormerSizes(256, 224, 14, 1408, 39, 16, 6144, 768, 12, 12, 3072, 512, 30523, 32)
TINY = QFormerSizes(32, 56, 14, 64, 2, 2, 128, 64, 2, 2, 128, 64, 600, 32)

_BERT = r"(encoder\.layer\.\d+)\.(attention|crossattention)"


def _qformer_rules(name: str, part: str) -> tuple[Rule, ...]:
    """Rules of one Q-Former: `Qformer` or SPN4CIR's `Qformer_query`, which keeps its own name."""
    return (
        (rf"{name}\.bert\.embeddings\.position_ids", None),
        (rf"{name}\.cls\..*", None),
        (rf"{name}\.bert\.embeddings\.LayerNorm\.(\w+)", rf"{part}.qformer.layernorm.\1"),
        (rf"{name}\.bert\.embeddings\.(.*)", rf"{part}.embeddings.\1"),
        (
            rf"{name}\.bert\.{_BERT}\.self\.(.*)",
            rf"{part}.qformer.\1.\2.attention.\3",
        ),
        (rf"{name}\.bert\.(encoder\..*)", rf"{part}.qformer.\1"),
    )


RULES: tuple[Rule, ...] = (
    *VISION_TRANSFORMER,
    (r"ln_vision\.(\w+)", r"vision_model.post_layernorm.\1"),
    *_qformer_rules("Qformer", "fusion"),
    *_qformer_rules("Qformer_query", "text"),
    (r"vision_proj\.(\w+)", r"vision_proj.\1"),
    (r"text_proj_q\.(\w+)", r"text.proj.\1"),
    (r"itm_head\..*", None),
    (r"temp", "temperature"),
)


class QFormer(nn.Module):
    """A Q-Former with its word embeddings."""

    def __init__(self, sizes: QFormerSizes) -> None:
        super().__init__()
        make_torchvision_importable()
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import (
            Blip2QFormerModel,
            Blip2TextEmbeddings,
        )

        config = Blip2QFormerConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.hidden,
            max_position_embeddings=sizes.positions,
            layer_norm_eps=1e-12,
            initializer_range=spread(sizes.width),
            cross_attention_frequency=2,
            encoder_hidden_size=sizes.vision_width,
            use_qformer_text_input=True,
        )
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)

    def with_image(
        self, queries_BQW: Tensor, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor
    ) -> Tensor:
        """Queries and a text, the queries attending to the image: (B, Q + T, W)."""
        queries = queries_BQW.shape[1]
        return self._run(queries_BQW, ids_BT, mask_BT, image_BPV, queries)

    def without_image(self, prompts_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Prompts and a text, all through the text feed-forward: (B, Q + T, W)."""
        return self._run(prompts_BQW, ids_BT, mask_BT, None, 0)

    def _run(
        self,
        first_BQW: Tensor,
        ids_BT: Tensor,
        mask_BT: Tensor,
        image_BPV: Tensor | None,
        query_length: int,
    ) -> Tensor:
        embedded = self.embeddings(input_ids=ids_BT, query_embeds=first_BQW)
        ones = mask_BT.new_ones(first_BQW.shape[:2])
        hidden: Tensor = self.qformer(
            query_embeds=embedded,
            query_length=query_length,
            attention_mask=torch.cat([ones, mask_BT], dim=1),
            encoder_hidden_states=image_BPV,
        ).last_hidden_state
        return hidden

    def of_image(self, queries_BQW: Tensor, image_BPV: Tensor) -> Tensor:
        """Queries that attend to an image, without a text: (B, Q, W)."""
        hidden: Tensor = self.qformer(
            query_embeds=queries_BQW, encoder_hidden_states=image_BPV
        ).last_hidden_state
        return hidden

    def prompted_text(self, prompts_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Prompts right after the first token, positions over the whole sequence: (B, Q + T, W)."""
        words = self.embeddings.word_embeddings(ids_BT)
        joined = torch.cat([words[:, :1], prompts_BQW, words[:, 1:]], dim=1)
        positions = torch.arange(joined.shape[1], device=ids_BT.device)
        embedded = joined + self.embeddings.position_embeddings(positions)
        ones = mask_BT.new_ones(prompts_BQW.shape[:2])
        hidden: Tensor = self.qformer(
            query_embeds=embedded, query_length=0, attention_mask=torch.cat([ones, mask_BT], dim=1)
        ).last_hidden_state
        return hidden


class TextSide(QFormer):
    """SPN4CIR's second stage: a Q-Former and a projection of its own for the pass without image."""

    def __init__(self, sizes: QFormerSizes) -> None:
        super().__init__(sizes)
        self.proj = nn.Linear(sizes.width, sizes.embed_dim)


class PromptedQFormer(nn.Module):
    """All weights of SPRC; random.

    Attributes:
        temperature: learnt in training, kept in checkpoints as `temp`.
        text: set in SPN4CIR's second stage.
    """

    def __init__(self, sizes: QFormerSizes, text_side: bool = False) -> None:
        super().__init__()
        make_torchvision_importable()
        from transformers import Blip2VisionConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

        vision = Blip2VisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=sizes.vision_hidden,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            layer_norm_eps=1e-6,
            qkv_bias=True,
            initializer_range=spread(sizes.vision_width),
        )
        self.vision_model = Blip2VisionModel(vision)
        self.vision_model.post_layernorm.eps = LN_VISION_EPS
        self.query_tokens = nn.Parameter(torch.randn(1, sizes.queries, sizes.width) * 0.02)
        self.prompt_tokens = nn.Parameter(torch.randn(1, sizes.queries, sizes.width) * 0.02)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.fusion = QFormer(sizes)
        self.vision_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.text_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.text = TextSide(sizes) if text_side else None

    def image_tokens(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1 + patches, V), after ln_vision."""
        tokens: Tensor = self.vision_model(images_B3HW).last_hidden_state
        return tokens


def sizes_of(
    tensors: Mapping[str, Tensor], where: str, heads: tuple[int, int] | None = None
) -> QFormerSizes:
    """Sizes from the shapes of published tensors.

    Args:
        tensors: published names.
        where: they come from, for messages.
        heads: of the vision tower and the Q-Former; the published width of a head by default.

    Raises:
        DataError: a tensor that says a size is missing.
    """
    try:
        patch = tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
        vision_width = tensors["visual_encoder.cls_token"].shape[-1]
        grid = round((tensors["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        words = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
        width = words.shape[1]
        vision_heads, qformer_heads = heads or (
            max(vision_width // EVA_HEAD_WIDTH, 1),
            max(width // QFORMER_HEAD_WIDTH, 1),
        )
        first = "Qformer.bert.encoder.layer.0.intermediate.dense.weight"
        return QFormerSizes(
            embed_dim=tensors["vision_proj.weight"].shape[0],
            image_size=grid * patch,
            patch_size=patch,
            vision_width=vision_width,
            vision_layers=layers_below(tensors, "visual_encoder.blocks."),
            vision_heads=vision_heads,
            vision_hidden=tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            width=width,
            layers=layers_below(tensors, "Qformer.bert.encoder.layer."),
            heads=qformer_heads,
            hidden=tensors[first].shape[0],
            positions=tensors["Qformer.bert.embeddings.position_embeddings.weight"].shape[0],
            vocab_size=words.shape[0],
            queries=tensors["query_tokens"].shape[1],
        )
    except KeyError as error:
        raise DataError(f"{where} holds no BLIP-2 weights: {error} is missing") from None


def load_qformer(tensors: Mapping[str, Tensor], sizes: QFormerSizes, where: str) -> PromptedQFormer:
    """Weights of a published file, upcast to float32.

    Raises:
        DataError: names what does not fit.
    """
    text_side = any(key.startswith("Qformer_query.") for key in tensors)
    module = PromptedQFormer(sizes, text_side)
    load_strictly(module, renamed_qformer(tensors), where)
    return module


def renamed_qformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to those of `PromptedQFormer`; query and value bias become one with zeros."""
    renamed = rename(tensors, RULES)
    bias = ".self_attn.qkv.bias"
    for key in [key for key in renamed if key.endswith(".attn.q_bias")]:
        block = key.removesuffix(".attn.q_bias")
        query, value = renamed.pop(key), renamed.pop(f"{block}.attn.v_bias")
        layer = block.replace("visual_encoder.blocks.", "vision_model.encoder.layers.")
        renamed[layer + bias] = torch.cat([query, torch.zeros_like(query), value])
    return renamed
