"""CLIP towers on open_clip, sized from a checkpoint, with CLIP's own tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import load_strictly
from dafm_ray.models.renaming import layers_below
from dafm_ray.models.torchvision_ops import make_torchvision_importable

START, END = 49406, 49407
"""CLIP's first and last token of a text; the last is the largest id, where texts are pooled."""

HEAD_WIDTH = 64
"""CLIP's rule; no state dict says how many heads there are."""

SIZE_BUFFERS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Sizes that OpenAI's files carry as tensors; they are not weights."""


@dataclass(frozen=True)
class TowerSizes:
    """Everything needed to build the two towers.

    Attributes:
        vision_layers: four block counts of a ResNet, or the depth of a ViT.
        patch_size: of a ViT; 0 for a ResNet.
        vision_head_width: of the ViT's heads, or of a ResNet's attention pool.
    """

    embed_dim: int
    image_size: int
    vision_layers: tuple[int, ...] | int
    vision_width: int
    patch_size: int
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_head_width: int = HEAD_WIDTH

    def __post_init__(self) -> None:
        if isinstance(self.vision_layers, list):  # JSON and YAML know no tuples
            object.__setattr__(self, "vision_layers", tuple(self.vision_layers))

    @staticmethod
    def from_weights(
        tensors: Mapping[str, Tensor], text_heads: int | None = None, where: str = "the file"
    ) -> "TowerSizes":
        """Read the sizes off the tensors' shapes.

        Args:
            tensors: a CLIP state dict in OpenAI's layout.
            text_heads: not stored in a state dict; CLIP's rule is width / 64.
            where: they come from, for messages.

        Raises:
            DataError: a tensor that says a size is missing.
        """
        try:
            return _sizes(tensors, text_heads)
        except KeyError as error:
            raise DataError(f"{where} holds no CLIP weights: {error} is missing") from None

    @property
    def vision(self) -> dict[str, Any]:
        """Fields of open_clip's `CLIPVisionCfg`."""
        return {
            "layers": self.vision_layers,
            "width": self.vision_width,
            "patch_size": self.patch_size,
            "image_size": self.image_size,
            "head_width": self.vision_head_width,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a weights file's header; see `Checkpoint.recorded_sizes`."""
        return asdict(self)


RN50X4 = TowerSizes(640, 288, (4, 6, 10, 6), 80, 0, 77, 49408, 640, 10, 12)
TINY = TowerSizes(32, 64, (1, 1, 1, 1), 8, 0, 77, 49408, 32, 2, 2)


def _sizes(tensors: Mapping[str, Tensor], text_heads: int | None) -> TowerSizes:
    text_width = tensors["ln_final.weight"].shape[0]
    first_conv = tensors["visual.conv1.weight"]
    if "visual.proj" in tensors:
        patch = first_conv.shape[-1]
        grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        layers: tuple[int, ...] | int = layers_below(tensors, "visual.transformer.resblocks.")
        width, image_size = first_conv.shape[0], patch * grid
    else:
        patch = 0
        grid = round((tensors["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        layers = tuple(layers_below(tensors, f"visual.layer{n}.") for n in (1, 2, 3, 4))
        width, image_size = tensors["visual.layer1.0.conv1.weight"].shape[0], 32 * grid
    return TowerSizes(
        embed_dim=tensors["text_projection"].shape[1],
        image_size=image_size,
        vision_layers=layers,
        vision_width=width,
        patch_size=patch,
        context_length=tensors["positional_embedding"].shape[0],
        vocab_size=tensors["token_embedding.weight"].shape[0],
        text_width=text_width,
        text_heads=text_heads or max(text_width // HEAD_WIDTH, 1),
        text_layers=layers_below(tensors, "transformer.resblocks."),
        vision_head_width=min(HEAD_WIDTH, width) if patch else HEAD_WIDTH,
    )


def build_towers(sizes: TowerSizes) -> nn.Module:
    """An `open_clip.model.CLIP` with QuickGELU, as OpenAI trained it; weights are random."""
    make_torchvision_importable()
    from open_clip.model import CLIP, CLIPTextCfg

    text = CLIPTextCfg(
        context_length=sizes.context_length,
        vocab_size=sizes.vocab_size,
        width=sizes.text_width,
        heads=sizes.text_heads,
        layers=sizes.text_layers,
    )
    towers: nn.Module = CLIP(
        sizes.embed_dim, vision_cfg=sizes.vision, text_cfg=text, quick_gelu=True
    )
    return towers


def load_towers(tensors: Mapping[str, Tensor], sizes: TowerSizes, where: str) -> nn.Module:
    """Towers of these sizes with these weights; DataError names what does not fit."""
    towers = build_towers(sizes)
    weights = {key: tensor for key, tensor in tensors.items() if key not in SIZE_BUFFERS}
    load_strictly(towers, weights, where)
    return towers


@cache
def _byte_pair_encoder() -> Any:
    make_torchvision_importable()
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def token_ids(text: str) -> list[int]:
    """CLIP's byte-pair ids of a text, without start and end."""
    # open_clip spells CLIP's two special tokens in another way.
    spelled = text.replace("<|startoftext|>", "<start_of_text>")
    spelled = spelled.replace("<|endoftext|>", "<end_of_text>")
    ids: list[int] = _byte_pair_encoder().encode(spelled)
    return ids


def vocabulary_of(texts: Sequence[str]) -> tuple[int, ...]:
    """Sorted ids that occur in `texts`, with 0, start and end: a small model's vocabulary."""
    seen = {id for text in texts for id in token_ids(text)}
    return tuple(sorted(seen | {0, START, END}))


def tokenize(
    texts: Sequence[str], context_length: int, vocabulary: Sequence[int] | None = None
) -> Tensor:
    """Texts to padded token ids; a longer text is cut and ends with the end token.

    Args:
        texts: B texts.
        context_length: T.
        vocabulary: sorted CLIP ids a small model knows; ids become positions in it and unknown
            ones 0. None keeps CLIP's ids.

    Returns:
        (B, T) int64.
    """
    rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
    positions = {id: n for n, id in enumerate(vocabulary)} if vocabulary is not None else None
    for row, text in zip(rows, texts, strict=True):
        ids = [START, *token_ids(text), END]
        if len(ids) > context_length:
            ids = [*ids[: context_length - 1], END]
        if positions is not None:
            ids = [positions.get(id, 0) for id in ids]
        row[: len(ids)] = torch.tensor(ids)
    return rows
