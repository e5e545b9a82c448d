"""Names of published checkpoints to names of the library's classes."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Rule = tuple[str, str | None]
"""Regular expression over the whole name, and its replacement; None drops the tensor."""

_BLOCK = r"visual_encoder\.blocks\.(\d+)\."
_LAYER = r"vision_model.encoder.layers.\1."
VISION_TRANSFORMER: tuple[Rule, ...] = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(\w+)", r"vision_model.embeddings.patch_embedding.\1"),
    (_BLOCK + r"norm(\d)\.(\w+)", _LAYER + r"layer_norm\2.\3"),
    (_BLOCK + r"attn\.qkv\.(\w+)", _LAYER + r"self_attn.qkv.\2"),
    (_BLOCK + r"attn\.proj\.(\w+)", _LAYER + r"self_attn.projection.\2"),
    (_BLOCK + r"(mlp\.fc\d\.\w+)", _LAYER + r"\2"),
)
"""The vision transformers of BLIP and BLIP-2, as far as both agree."""


def rename(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Rename by the first rule that matches; a name without a rule stays, and is named later as
    unexpected.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                if replacement is not None:
                    renamed[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            renamed[name] = tensor
    return renamed


def layers_below(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers stand under a prefix that ends with a dot."""
    return len({key[len(prefix) :].split(".")[0] for key in tensors if key.startswith(prefix)})
