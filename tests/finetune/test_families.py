"""Every family learns from triplets, from nothing, and what it learnt is a frozen model again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.trainer import build, save_weights, train
from dafm_ray.models.registry import load_model
from tests.samples import image_folder, picture

VIT = {
    "embed_dim": 32,
    "image_size": 64,
    "vision_layers": 1,
    "vision_width": 64,
    "patch_size": 16,
    "context_length": 12,
    "text_width": 64,
    "text_heads": 1,
    "text_layers": 1,
}
BLIP = {
    "embed_dim": 32,
    "image_size": 64,
    "patch_size": 16,
    "vision_width": 64,
    "vision_layers": 1,
    "vision_heads": 1,
    "vision_hidden": 128,
    "text_width": 64,
    "text_layers": 1,
    "text_heads": 1,
    "text_hidden": 128,
    "text_positions": 32,
}
QFORMER = {
    "embed_dim": 32,
    "image_size": 56,
    "patch_size": 14,
    "vision_width": 64,
    "vision_layers": 1,
    "vision_heads": 1,
    "vision_hidden": 128,
    "width": 64,
    "layers": 2,
    "heads": 1,
    "hidden": 128,
    "positions": 64,
    "queries": 4,
}
FAMILIES = {
    "tgcir:base": VIT,
    "tgcir:spn": VIT,
    "blip4cir:stage1": BLIP,
    "biblip4cir:sum": BLIP,
    "biblip4cir:combiner": BLIP,
    "sprc:base": QFORMER,
    "sprc:spn": QFORMER,
    "sprc:pooled": QFORMER,
}


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images", 24, 16)
    colours = np.random.default_rng(0).integers(0, 255, (24, 3))
    for n, colour in enumerate(colours.tolist()):
        Image.new("RGB", (40, 32), tuple(colour)).save(root / f"{n:03d}.png")
    data = DatasetConfig("folder", root=str(root))
    return FinetuneConfig(
        train=data,
        validation=data,
        model="",
        out=str(tmp_path / "out"),
        epochs=40,
        patience=40,
        batch_size=8,
        learning_rate=1e-3,
        logit_scale=20.0,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_falls_and_the_weights_load_again(config, tmp_path, name):
    config = replace(config, model=f"{name}@scratch", scratch={"towers": FAMILIES[name]})
    model, reports = build(config), []
    train(config, model, lambda loss: loss, lambda metrics, state: reports.append(metrics))
    assert reports[-1]["loss"] < 0.95 * reports[0]["loss"]
    save_weights(model, tmp_path / "weights.safetensors")
    again = load_model(f"{name}@{tmp_path / 'weights.safetensors'}")
    model.module.eval()
    images = torch.stack([model.preprocess(picture(seed)) for seed in (1, 2)])
    texts = [model.caption([text]) for text in ("change 3", "something else")]
    with torch.inference_mode():
        for one, other in (
            (model.encode_gallery(images), again.encode_gallery(images)),
            (
                model.encode_queries(images, torch.tensor([1, 0]), texts),
                again.encode_queries(images, torch.tensor([1, 0]), texts),
            ),
        ):
            assert torch.allclose(one, other, atol=1e-6)


def test_weights_of_a_loss_are_the_familys_own(config):
    towers = {"towers": QFORMER}
    known = replace(config, model="sprc:base@scratch", scratch=towers, loss={"rtc": 1.0})
    assert build(known) is not None
    with pytest.raises(ConfigError, match="no term of this family's loss 'rct'"):
        build(replace(known, loss={"rct": 1.0}))
    with pytest.raises(ConfigError, match="must hold the fields of QFormerSizes"):
        build(replace(known, scratch={"towers": BLIP}))


def test_a_trained_model_is_where_another_of_its_towers_starts(config, tmp_path):
    blip = {**BLIP, "image_size": 56, "patch_size": 14}
    first = build(replace(config, model="biblip4cir:sum@scratch", scratch={"towers": blip}))
    file = tmp_path / "towers.safetensors"
    save_weights(first, file)
    learnt = first.module.towers.state_dict()
    attending = build(replace(config, model=f"blip4cir:stage1@{file}")).module.towers.state_dict()
    assert all(torch.equal(attending[key], learnt[key]) for key in learnt)
    sizes = {key: value for key, value in QFORMER.items() if not key.startswith("vision_")}
    scratch = {"towers": sizes, "vision": str(file)}
    former = build(replace(config, model="sprc:base@scratch", scratch=scratch)).module
    for key, tensor in former.vision_model.state_dict().items():
        assert torch.equal(tensor, learnt[f"vision_model.{key}"])
    wider = {"towers": {**QFORMER, "vision_hidden": 256}, "vision": str(file)}
    with pytest.raises(ConfigError, match="vision_hidden is 256, but 128"):
        build(replace(config, model="sprc:base@scratch", scratch=wider))
