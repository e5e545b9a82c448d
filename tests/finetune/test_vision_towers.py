"""A Q-Former learns on any frozen vision tower, and its file holds all that it needs."""

from dataclasses import replace

import pytest
import torch

from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.trainer import build, save_weights, train
from dafm_ray.models.registry import load_model
from tests.finetune.test_families import QFORMER, VIT
from tests.models import tiny_clip
from tests.samples import image_folder, picture

FORMER = {
    key: QFORMER[key]
    for key in ("embed_dim", "width", "layers", "heads", "hidden", "positions", "queries")
}
PARTS = {
    "base": (
        *("fusion", "query_tokens", "prompt_tokens"),
        *("vision_proj", "text_proj", "temperature"),
    ),
    "pooled": ("embeddings", "image_proj", "text_proj", "vision_proj", "temperature"),
}
RESNET = {**VIT, "vision_layers": [1, 1, 1, 1], "vision_width": 4, "patch_size": 0}
TOWERS = ("blip", "vit", "resnet", "Tiny-ViT/random", "Tiny-timm/random", "Tiny-convnext/random")


@pytest.fixture
def config(tmp_path):
    data = DatasetConfig("folder", root=str(image_folder(tmp_path / "images", 12, 8)))
    return FinetuneConfig(
        train=data,
        validation=data,
        model="sprc:base@scratch",
        out=str(tmp_path / "out"),
        epochs=2,
        batch_size=4,
    )


def scratch_of(config, tower, tmp_path):
    if tower == "blip":
        return {"towers": QFORMER}
    if "/" in tower:
        return {"towers": FORMER, "vision": tower}
    sizes = VIT if tower == "vit" else RESNET
    clip = build(replace(config, model="clip4cir:sum@scratch", scratch={"towers": sizes}))
    save_weights(clip, tmp_path / "clip.safetensors")
    return {"towers": FORMER, "vision": str(tmp_path / "clip.safetensors")}


@pytest.mark.parametrize("variant", PARTS)
@pytest.mark.parametrize("tower", TOWERS)
def test_the_tower_stays_and_the_file_rebuilds_the_model(config, tower, variant, tmp_path):
    with pytest.MonkeyPatch.context() as known:
        tiny_clip.register(known, tmp_path)
        config = replace(
            config,
            model=f"sprc:{variant}@scratch",
            scratch=scratch_of(config, tower, tmp_path),
            parts=PARTS[variant],
        )
        model = build(config)
    learning = {name for name, p in model.module.named_parameters() if p.requires_grad}
    frozen = {name for name, _ in model.module.named_parameters()} - learning
    assert {name.partition(".")[0] for name in learning} == set(PARTS[variant])
    assert {name.partition(".")[0] for name in frozen} == {"vision_model"}
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    train(config, model, lambda loss: loss, lambda metrics, state: None)
    reached = {name for name, p in model.module.named_parameters() if p.grad is not None}
    assert reached == learning
    after = model.module.state_dict()
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved
    assert moved <= learning
    file = tmp_path / "weights.safetensors"
    save_weights(model, file)
    again = load_model(f"sprc:{variant}@{file}")  # open_clip no longer knows the architecture
    model.module.eval()
    images = torch.stack([model.preprocess(picture(seed)) for seed in (1, 2)])
    assert torch.equal(images, torch.stack([again.preprocess(picture(seed)) for seed in (1, 2)]))
    with torch.inference_mode():
        assert torch.equal(model.encode_gallery(images), again.encode_gallery(images))
        index = torch.tensor([1, 0])
        one, other = (m.encode_queries(images, index, ["change 3", ""]) for m in (model, again))
        assert torch.equal(one, other)
    if tower != "blip":
        onward = replace(config, scratch={"towers": FORMER, "vision": str(file)})
        tower_again = build(onward).module.vision_model.state_dict()
        assert all(torch.equal(after[f"vision_model.{k}"], v) for k, v in tower_again.items())


def test_sizes_of_a_tower_are_its_own(config, monkeypatch, tmp_path):
    tiny_clip.register(monkeypatch, tmp_path)
    vision = {"vision": "Tiny-ViT/random"}
    model = build(replace(config, scratch={**vision, "towers": {**FORMER, "vision_width": 16}}))
    assert (model.sizes.vision_width, model.sizes.image_size) == (16, 32)
    with pytest.raises(ConfigError, match="vision_width is 64, but 16"):
        build(replace(config, scratch={**vision, "towers": {**FORMER, "vision_width": 64}}))
    with pytest.raises(ConfigError, match=r"the fields of FormerSizes.*vision_layers"):
        build(replace(config, scratch={**vision, "towers": {**FORMER, "vision_layers": 1}}))
    with pytest.raises(DataError, match="no architecture 'ViT-B-23'; did you mean 'ViT-B-32'"):
        build(replace(config, scratch={"vision": "ViT-B-23/openai", "towers": FORMER}))
