from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.models.base import Contrast
from dafm_ray.models.checkpoints import read_checkpoint
from dafm_ray.models.clip_towers import TowerSizes
from dafm_ray.models.tgcir import (
    VIT_B16,
    TgCir,
    TgCirWeights,
    load_tgcir,
    published,
)
from tests.models.golden import Golden, meta_tensors, shapes

TEXT_HEADS, VISION_HEADS = 4, 3
"""Of the golden towers; no state dict stores them."""

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def load(fixture: Golden, file: str, spn: bool) -> TgCir:
    tensors = published(read_checkpoint(str(fixture.folder / file)).tensors)
    clip = {k.removeprefix("backbone.clip."): v for k, v in tensors.items()}
    found = TowerSizes.from_weights(clip, TEXT_HEADS)
    sizes = replace(found, vision_head_width=found.vision_width // VISION_HEADS)
    return TgCir(load_tgcir(tensors, sizes, spn, file).eval(), sizes, "spn" if spn else "base")


@pytest.mark.parametrize(
    ("file", "stage"),
    [("stage1.pt", 1), ("weights_stage1.safetensors", 1), ("stage2.pt", 2)],
)
@torch.inference_mode()
def test_equals_the_published_implementation(golden, file, stage):
    fixture = Golden(golden / "tgcir", f"outputs_stage{stage}.safetensors")
    model = load(fixture, file, stage == 2)
    images, tokens = fixture.inputs["images"], fixture.inputs["tokens"].long()
    reference = model.module.backbone.image_tokens(images)
    text = model.module.backbone.text_tokens(tokens)
    fixture.same("ref_tokens", reference, **TOLERANCE)
    fixture.same("mod_tokens", text, **TOLERANCE)
    fused = model.fuse(reference, text)
    if stage == 1:
        share = model.module.s_remain_map.share(reference, text)
        fixture.same("remain_mask", share, **TOLERANCE)
        fixture.same("replace_mask", 1 - share, **TOLERANCE)
        fixture.same("fused_tokens", fused, **TOLERANCE)
    queries = F.normalize(fused.mean(1), dim=-1)
    gallery = model.encode_gallery(images)
    fixture.same("query", queries, **TOLERANCE)
    fixture.same("target", gallery, **TOLERANCE)
    fixture.same("similarity", model.score(queries, gallery), **TOLERANCE)


@pytest.mark.parametrize("second_stage", [False, True])
def test_full_size_keys_and_shapes_are_those_of_the_real_files(golden, second_stage):
    name = "keys_full_spn_stage2.json" if second_stage else "keys_full.json"
    keys = Golden(golden / "tgcir", "outputs_stage1.safetensors").json(name)["keys"]
    with torch.device("meta"):
        module = TgCirWeights(VIT_B16, text_side=second_stage)
    assert shapes(published(meta_tensors(keys))) == shapes(module.state_dict())


def test_the_six_terms_of_the_loss(golden):
    fixture = Golden(golden / "tgcir", "outputs_stage1.safetensors")
    model = load(fixture, "stage1.pt", spn=False)
    tokens = fixture.inputs["tokens"].long()
    backbone = model.module.backbone
    images = backbone.image_tokens(fixture.inputs["images"])
    target = images[[1, 2, 3, 0]]
    weights = model.loss_weights
    terms = model.token_terms(images, backbone.text_tokens(tokens), target, weights)
    losses = {
        "loss_stu_rank": contrastive(terms.contrasts["student"]),
        "loss_tea_rank": contrastive(terms.contrasts["teacher"]),
        "loss_tea_mask": terms.penalties["mask"][1],
        "loss_ortho": terms.penalties["ortho"][1],
        "loss_ckd": terms.penalties["ckd"][1],
        "loss_kl": terms.penalties["kl"][1],
    }
    for name, found in losses.items():
        fixture.same(name, found, atol=1e-4, rtol=1e-4)


def contrastive(contrast: Contrast) -> torch.Tensor:
    scores = contrast.scale * TgCir.score(contrast.queries, contrast.candidates)
    return in_batch_contrastive(scores, torch.arange(len(scores)))
