import pytest
import torch

from dafm_ray.models.clip_vision import ClipVision, learnt_vision
from tests.models import tiny_clip


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    tiny_clip.register(monkeypatch, tmp_path)


def features(visual, tokens):
    """What open_clip makes of the tower's last tokens."""
    if hasattr(visual, "trunk"):
        if visual.trunk.num_features == tokens.shape[-1] and not hasattr(visual.trunk, "cls_token"):
            side = round(tokens.shape[1] ** 0.5)
            tokens = tokens.transpose(1, 2).unflatten(2, (side, side))
        return visual.head(visual.trunk.forward_head(tokens))
    if hasattr(visual, "attnpool"):
        side = round(tokens.shape[1] ** 0.5)
        return visual.attnpool(tokens.transpose(1, 2).unflatten(2, (side, side)))
    if visual.attn_pool is not None:
        return visual._pool(tokens)[0] @ visual.proj
    return tokens[:, 0] @ visual.proj


class Nothing(torch.nn.Module):
    """In place of a block."""

    def forward(self, tokens, *_arguments, **_options):
        return tokens


def without_last_block(visual):
    """A tower whose feature is its class token, up to the block that only that is read from."""
    if hasattr(visual, "trunk"):
        if hasattr(visual.trunk, "cls_token"):
            visual.trunk.blocks[-1] = Nothing()
    elif hasattr(visual, "class_embedding") and visual.attn_pool is None:
        visual.transformer.resblocks[-1] = Nothing()
    return visual


@pytest.mark.parametrize("name", tiny_clip.ARCHITECTURES)
@torch.inference_mode()
def test_the_tokens_are_those_from_which_open_clip_makes_its_feature(name):
    tower = learnt_vision(f"{name}/random")
    assert isinstance(tower, ClipVision)
    tower.eval()
    images = torch.randn(2, 3, tower.image_size, tower.image_size)
    tokens = tower(images)
    assert tokens.shape[2] == tower.width
    expected = without_last_block(tower.visual)(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert torch.allclose(features(tower.visual, tokens), expected, atol=1e-5)


@torch.inference_mode()
def test_the_patch_tokens_of_a_vit_are_open_clips_own():
    tower = learnt_vision("Tiny-ViT/random")
    assert isinstance(tower, ClipVision)
    tower.eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = tower(images)
    tower.visual.output_tokens = True
    _, patches = without_last_block(tower.visual)(images)
    assert tokens.shape == (2, 5, 16)
    assert torch.equal(tokens[:, 1:], patches)
