"""Vision towers of CLIP models as sources of image tokens: those of open_clip, and of CLIP4CIR."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dafm_ray.models.checkpoints import Checkpoint, load_strictly, read_checkpoint
from dafm_ray.models.clip4cir import LAYOUTS, towers_of
from dafm_ray.models.open_clip_tags import (
    OpenClipModel,
    architecture_config,
    evaluation_transform,
    is_tag,
)
from dafm_ray.models.torchvision_ops import make_torchvision_importable

HEADER = "vision"
"""Key of a weights file's header: the `ClipVisionConfig` of the tower in it."""


@dataclass(frozen=True)
class ClipVisionConfig:
    """Everything needed to build a tower.

    Attributes:
        embed_dim: of its CLIP model.
        vision: fields of open_clip's `CLIPVisionCfg`.
        quick_gelu: its activation.
        preprocess: what `evaluation_transform` takes; None for the padding of CLIP4CIR.
    """

    embed_dim: int
    vision: Mapping[str, Any]
    quick_gelu: bool
    preprocess: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a weights file's header."""
        return asdict(self)


class ClipVision(nn.Module):
    """The vision tower of a CLIP model.

    Args:
        config: of the tower.
        visual: a tower that exists; a random one by default.
    """

    def __init__(self, config: ClipVisionConfig, visual: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.visual: Any = visual or _build(config)

    @property
    def image_size(self) -> int:
        """Side of its images in pixels."""
        size = self.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def width(self) -> int:
        """V of its tokens, found by a forward pass."""
        with torch.inference_mode():
            side = self.image_size
            return int(self.eval()(torch.zeros(1, 3, side, side)).shape[-1])

    @cached_property
    def _transform(self) -> Any:
        assert self.config.preprocess is not None
        return evaluation_transform(self.config.preprocess)

    def preprocess(self, image: Image.Image) -> Tensor:
        """open_clip's own: one decoded image in its stored colour mode -> (3, H, W) float32."""
        tensor: Tensor = self._transform(image)
        return tensor

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, V): class token, if there is one, and patches, after the tower's
        last norm. A tower that attends to its patches through a pool has none before it.

        Where a class token alone is the image's feature, nothing has trained the patches of the
        last block, and those of the block before it are taken, as BLIP-2 does, if there is one.
        """
        visual = self.visual
        trunk = getattr(visual, "trunk", None)  # of timm
        has_class = hasattr(visual, "class_embedding") or getattr(trunk, "num_prefix_tokens", 0) > 0
        pooled = getattr(visual, "attn_pool", None) is not None
        found = visual.forward_intermediates(
            images_B3HW,
            indices=2 if has_class and not pooled and _blocks(visual) > 1 else 1,
            normalize_intermediates=not pooled,
            intermediates_only=True,
            output_extra_tokens=has_class,
        )
        patches_BPV: Tensor = found["image_intermediates"][0].flatten(2).transpose(1, 2)
        if not has_class:
            return patches_BPV
        return torch.cat([found["image_intermediates_prefix"][0], patches_BPV], dim=1)


def _blocks(visual: Any) -> int:
    trunk = getattr(visual, "trunk", None)
    return len(trunk.blocks if trunk is not None else visual.transformer.resblocks)


def _build(config: ClipVisionConfig) -> nn.Module:
    make_torchvision_importable()
    from open_clip import CLIP

    unused_text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    towers = CLIP(config.embed_dim, dict(config.vision), unused_text, quick_gelu=config.quick_gelu)
    visual: nn.Module = towers.visual
    return visual


def learnt_vision(location: str) -> ClipVision | Checkpoint:
    """A tower that has been trained.

    Args:
        location: `architecture/pretrained` of open_clip, or a weights file, as of CLIP4CIR's
            training or of a model on such a tower.

    Returns:
        The tower of a CLIP model; the checkpoint itself if it holds none.

    Raises:
        DataError: there is no such model, or its file does not fit.
    """
    if is_tag(location):
        model = OpenClipModel.load(location)
        known = architecture_config(model.architecture)
        config = ClipVisionConfig(
            known["embed_dim"], known["vision_cfg"], model.quick_gelu, model.preprocess_config
        )
        return ClipVision(config, model.module.visual)
    checkpoint = read_checkpoint(location)
    if HEADER in checkpoint.metadata:
        tower = ClipVision(checkpoint.recorded_sizes(ClipVisionConfig, HEADER))
        load_strictly(tower, checkpoint.section("vision_model"), checkpoint.where)
        return tower
    if not any(key.startswith(f"{prefix}.") for key in checkpoint.tensors for prefix in LAYOUTS):
        return checkpoint
    towers, sizes = towers_of(checkpoint)
    visual: Any = towers.visual
    return ClipVision(ClipVisionConfig(sizes.embed_dim, sizes.vision, True, None), visual)
