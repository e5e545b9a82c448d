"""BLIP-2's vision tower and Q-Former on transformers' classes, with SPRC's prompt tokens.

Two details of transformers' classes make the numbers silently wrong and are set here: the norm
after the vision tower has eps 1e-5 where the class takes the tower's 1e-6, and a pass without an
image runs every position through the text feed-forward (`query_length=0`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from dafm_ray.errors import DataError
from dafm_ray.models.base import unit
from dafm_ray.models.checkpoints import load_strictly
from dafm_ray.models.initialisation import spread
from dafm_ray.models.renaming import VISION_TRANSFORMER, Rule, layers_below, rename
from dafm_ray.models.torchvision_ops import make_torchvision_importable

LN_VISION_EPS = 1e-5
EVA_HEAD_WIDTH, QFORMER_HEAD_WIDTH = 88, 64
"""Of published sizes; no state dict says how many heads there are."""


@dataclass(frozen=True)
class FormerSizes:
    """Everything needed to build a Q-Former on a vision tower that exists."""

    embed_dim: int
    image_size: int
    vision_width: int
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


@dataclass(frozen=True)
class QFormerSizes(FormerSizes):
    """Everything needed to build BLIP-2's vision tower and the Q-Former."""

    patch_size: int
    vision_layers: int
    vision_heads: int
    vision_hidden: int


EVA_G = QFormerSizes(
    embed_dim=256,
    image_size=224,
    patch_size=14,
    vision_width=1408,
    vision_layers=39,
    vision_heads=16,
    vision_hidden=6144,
    width=768,
    layers=12,
    heads=12,
    hidden=3072,
    positions=512,
    vocab_size=30523,
    queries=32,
)
TINY = replace(
    EVA_G,
    embed_dim=32,
    image_size=56,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    vision_hidden=128,
    width=64,
    layers=2,
    heads=2,
    hidden=128,
    positions=64,
    vocab_size=600,
)

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

    def __init__(self, sizes: FormerSizes) -> None:
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

    def __init__(self, sizes: FormerSizes) -> None:
        super().__init__(sizes)
        self.proj = nn.Linear(sizes.width, sizes.embed_dim)


class OnImageTokens(nn.Module):
    """What models on the tokens of a vision tower share.

    Args:
        sizes: of the model.
        vision: the tower, which gives (B, P, V) tokens; BLIP-2's own, random, by default.

    Attributes:
        temperature: learnt in training, kept in checkpoints as `temp`.
    """

    def __init__(self, sizes: FormerSizes, vision: nn.Module | None = None) -> None:
        super().__init__()
        if vision is None:
            assert isinstance(sizes, QFormerSizes)
            vision = _blip2_vision(sizes)
        self.vision_model = vision
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def image_tokens(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, V), after the tower's last norm."""
        found = self.vision_model(images_B3HW)
        tokens: Tensor = found if isinstance(found, Tensor) else found.last_hidden_state
        return tokens


def _blip2_vision(sizes: QFormerSizes) -> nn.Module:
    make_torchvision_importable()
    from transformers import Blip2VisionConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel

    config = Blip2VisionConfig(
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
    tower = Blip2VisionModel(config)
    tower.post_layernorm.eps = LN_VISION_EPS
    return cast(nn.Module, tower)


def new_tokens(sizes: FormerSizes) -> Tensor:
    """(1, Q, W) random query or prompt tokens."""
    return torch.randn(1, sizes.queries, sizes.width) * 0.02


class PromptedQFormer(OnImageTokens):
    """All weights of SPRC; random but for a given vision tower.

    Attributes:
        text: set in SPN4CIR's second stage.
    """

    def __init__(
        self, sizes: FormerSizes, text_side: bool = False, vision: nn.Module | None = None
    ) -> None:
        super().__init__(sizes, vision)
        self.query_tokens = nn.Parameter(new_tokens(sizes))
        self.prompt_tokens = nn.Parameter(new_tokens(sizes))
        self.fusion = QFormer(sizes)
        self.vision_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.text_proj = nn.Linear(sizes.width, sizes.embed_dim)
        self.text = TextSide(sizes) if text_side else None

    def candidates(self, image_BPV: Tensor) -> Tensor:
        """(B, P, V) -> (B, Q, D), each vector L2-normalised."""
        queries_BQW = self.query_tokens.expand(len(image_BPV), -1, -1)
        return unit(self.vision_proj(self.fusion.of_image(queries_BQW, image_BPV)))

    def fuse(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pass 1 turns reference and text into prompts; pass 2 reads prompts and text, no image."""
        return self.read(self.prompts(image_BPV, ids_BT, mask_BT), ids_BT, mask_BT)

    def prompts(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, Q, W): the sentence-level prompts of pass 1."""
        queries_BQW = self.query_tokens.expand(len(image_BPV), -1, -1)
        hidden_BLW = self.fusion.with_image(queries_BQW, image_BPV, ids_BT, mask_BT)
        return hidden_BLW[:, : queries_BQW.shape[1]]

    def read(self, prompts_BQW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Pass 2: (B, D), L2-normalised."""
        former = self.fusion if self.text is None else self.text
        project = self.text_proj if self.text is None else self.text.proj
        hidden_BLW = former.without_image(prompts_BQW, ids_BT, mask_BT)
        return unit(project(hidden_BLW[:, prompts_BQW.shape[1]]))


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
