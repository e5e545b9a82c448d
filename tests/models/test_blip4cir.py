import pytest
import torch

from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.models.blip import (
    BASE,
    BlipTowers,
    load_blip,
    renamed_blip,
    resized_positions,
    sizes_of,
)
from dafm_ray.models.blip4cir import BACKWARD, FORWARD, BiBlip4Cir, Blip4Cir, BlipWeights, tagged
from dafm_ray.models.checkpoints import read_checkpoint
from dafm_ray.models.clip4cir import combiner_of
from dafm_ray.models.wordpieces import WordPieces
from tests.models.golden import Golden, meta_tensors, shapes

HEADS = (4, 4)
"""Of the golden towers; no state dict stores them."""

UNIT, HIDDEN = 1e-5, 3e-5


@pytest.fixture(scope="module")
def stage1(golden):
    return Golden(golden / "blip4cir")


@pytest.fixture(scope="module")
def bi(golden):
    return Golden(golden / "biblip4cir")


@pytest.mark.parametrize("file", ["blip_mean.pt", "weights.safetensors"])
@torch.inference_mode()
def test_stage_1_equals_the_published_implementation(stage1, file):
    tensors = read_checkpoint(str(stage1.folder / file)).section("BLIP_Retrieval")
    sizes = sizes_of(tensors, file, heads=HEADS)
    towers = load_blip(tensors, sizes, file).eval()
    model = Blip4Cir(BlipWeights(towers), sizes, "stage1", WordPieces(stage1.words()))
    references, targets = (stage1.inputs[f"{name}_images"] for name in ("reference", "target"))
    captions = [entry["text"] for entry in stage1.json("captions.json")]
    ids, mask = model.words(captions)
    assert torch.equal(ids, stage1.inputs["input_ids"])
    assert torch.equal(mask, stage1.inputs["attention_mask"])
    stage1.same("reference_vit_tokens", towers.image_tokens(references), HIDDEN)
    gallery = model.encode_gallery(targets)
    stage1.same("target_features", gallery, UNIT)
    stage1.same("reference_features", model.encode_gallery(references), UNIT)
    stage1.same("target_vit_tokens", towers.image_tokens(targets), HIDDEN)
    stage1.same("text_mode_last_hidden_state", towers.text_hidden(ids, mask, None), HIDDEN)
    encoded = stage1.inputs["input_ids_enc"]
    hidden = towers.text_hidden(encoded, mask, towers.image_tokens(references))
    stage1.same("fusion_last_hidden_state", hidden, HIDDEN)
    queries = model.encode_queries(references, torch.arange(4), captions)
    stage1.same("query_features", queries, UNIT)
    stage1.same("similarity", model.score(queries, gallery), UNIT)
    alone = model.encode_queries(references[:1], torch.tensor([0]), captions[:1])
    stage1.same("query_features_single", alone, UNIT)
    logits = model.score(queries, gallery) / towers.temperature
    stage1.same("train_logits", logits, 1e-3)
    terms = model.terms(references, captions, targets, 1.0, {})
    rank = terms.contrasts["rank"]
    scores = rank.scale * model.score(rank.queries, rank.candidates)
    stage1.same("train_loss", in_batch_contrastive(scores, torch.arange(4)), 1e-4)


def test_positions_of_another_resolution(stage1):
    found = resized_positions(stage1.inputs["pos_embed_src"], 4)
    stage1.same("pos_embed_interpolated", found, 1e-6)


@pytest.mark.parametrize("variant", ["sum", "combiner"])
@torch.inference_mode()
def test_bi_blip_equals_the_published_implementation(bi, variant):
    files = ["model_base.pth", "tuned_blip_mean.pt", "combiner_mean.pt"]
    checkpoint = read_checkpoint("+".join(str(bi.folder / file) for file in files))
    model = BiBlip4Cir.of_checkpoint(checkpoint, variant, image_size=32, heads=HEADS)
    model.words = WordPieces(bi.words())
    model.module.eval()
    own = torch.arange(4)
    raw = [entry["raw"] for entry in bi.json("captions.json")]
    texts = [tagged(text, FORWARD) for text in raw]
    assert texts == [entry["forward"] for entry in bi.json("captions.json")]
    assert torch.equal(model.words(texts, 77)[0], bi.inputs["input_ids_forward"])
    gallery = model.encode_gallery(bi.inputs["target_images"])
    bi.same("target_features_normalized", gallery, UNIT)
    queries = model.encode_queries(bi.inputs["reference_images"], torch.arange(4), texts)
    bi.same(f"query_{variant}", queries, UNIT)
    bi.same(f"similarity_{variant}", model.score(queries, gallery), UNIT)
    stage = {"sum": "stage1", "combiner": "stage2"}[variant]
    images = [bi.inputs[f"{name}_images"] for name in ("reference", "target")]
    terms = model.terms(images[0], texts, images[1], 100.0, {"reversed": 1.0})
    rank = terms.contrasts["rank"]
    loss = in_batch_contrastive(rank.scale * model.score(rank.queries, rank.candidates), own)
    bi.same(f"{stage}_loss_forward", loss, 1e-4)
    bi.same(f"{stage}_loss_reversed", terms.penalties["reversed"][1], 1e-4)
    references, targets = (model.image_features(image) for image in images)
    bi.same("reference_features", references, HIDDEN)
    bi.same("text_features_forward", model.text_features(texts), HIDDEN)
    backward = model.text_features([text.replace(FORWARD, BACKWARD) for text in texts])
    bi.same("text_features_backward", backward, HIDDEN)
    logits = 100 * model.reversed_scores(references, backward, targets)
    bi.same(f"{stage}_logits_reversed", logits, 1e-3)
    assert not model.terms(images[0], texts, images[1], 100.0, {"reversed": 0.0}).penalties


def test_full_size_keys_and_shapes_are_those_of_the_real_files(stage1, bi):
    with torch.device("meta"):
        expected = shapes(BlipTowers(BASE).state_dict())
    keys = stage1.json("keys_full.json")["keys"]
    assert shapes(renamed_blip(meta_tensors(keys))) == expected
    second = stage1.json("keys_full_spn_stage2.json")["keys"]
    below = {key.removeprefix("blip."): value for key, value in second.items() if key != "tau"}
    assert shapes(renamed_blip(meta_tensors(below))) == expected
    parts = bi.json("keys_full.json")["keys"]
    towers = {
        key.partition(".")[2]: value
        for key, value in parts.items()
        if not key.startswith("Combiner.")
    }
    assert shapes(renamed_blip(meta_tensors(towers))) == {
        key: shape for key, shape in expected.items() if key != "temperature"
    }
    assert sizes_of(meta_tensors(keys), "real") == BASE


def test_combiner_files_are_those_of_clip4cir(bi):
    checkpoint = read_checkpoint(str(bi.folder / "combiner_mean.pt"))
    assert combiner_of(checkpoint).output_layer.out_features == 16
