"""Tiny architectures of each kind that open_clip builds, under names of their own."""

import json
from pathlib import Path

import pytest

from dafm_ray.models.torchvision_ops import make_torchvision_importable

make_torchvision_importable()
import open_clip  # noqa: E402

VIT = {"image_size": 32, "layers": 2, "width": 16, "patch_size": 16, "head_width": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "patch_size": None}

ARCHITECTURES = {
    "Tiny-ViT": {"vision_cfg": VIT, "text_cfg": TEXT},
    "Tiny-ResNet": {"vision_cfg": RESNET, "text_cfg": TEXT},
    "Tiny-custom-text": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "Tiny-timm": {
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
        "text_cfg": TEXT,
    },
    "Tiny-convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "image_size": 160},
        "text_cfg": TEXT,
    },
    "Tiny-coca": {
        "vision_cfg": {
            **VIT,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make `ARCHITECTURES` known to open_clip, and `Tiny-BERT`, whose text tower is a transformer
    of Hugging Face with a tokenizer of its own.
    """
    bert = folder / "bert"
    bert.mkdir()
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    config = {"model_type": "bert", "num_attention_heads": 2, "max_position_embeddings": 40}
    (bert / "config.json").write_text(json.dumps(config | sizes))
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nred\ndress\n")
    text = {
        "hf_model_name": str(bert),
        "hf_tokenizer_name": str(bert),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
        "context_length": 9,
    }
    every = ARCHITECTURES | {"Tiny-BERT": {"vision_cfg": VIT, "text_cfg": text}}
    for name, towers in every.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {"embed_dim": 8, **towers})
