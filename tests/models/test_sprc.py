import pytest
import torch

from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.models.base import Contrast
from dafm_ray.models.checkpoints import read_checkpoint
from dafm_ray.models.qformer import (
    EVA_G,
    PromptedQFormer,
    load_qformer,
    renamed_qformer,
    sizes_of,
)
from dafm_ray.models.sprc import AUTHORS_KEY, Sprc
from dafm_ray.models.wordpieces import WordPieces
from tests.models.golden import Golden, meta_tensors, shapes

HEADS = (4, 4)
"""Of the golden towers; no state dict stores them."""

UNIT, HIDDEN, LOSS = 1e-5, 3e-5, 1e-4

FILES = {
    "sprc": ("tuned_clip_arithmetic.pt", AUTHORS_KEY, "base"),
    "sprc_spn_stage2": ("stage2.pt", "state_dict.blip_model", "spn"),
}


@pytest.fixture(scope="module", params=FILES)
def fixture(request, golden):
    return Golden(golden / request.param)


def load(fixture: Golden, words: list[str], file: str | None = None) -> Sprc:
    name, prefix, variant = FILES[fixture.folder.name]
    tensors = read_checkpoint(str(fixture.folder / (file or name))).section(prefix)
    sizes = sizes_of(tensors, name, HEADS)
    return Sprc(load_qformer(tensors, sizes, name).eval(), sizes, variant, WordPieces(words))


@torch.inference_mode()
def test_equals_the_published_implementation(fixture, golden):
    model = load(fixture, Golden(golden / "sprc").words())
    inputs = fixture.inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = model.module.image_tokens(inputs["reference_images"])
    fixture.same("reference_image_tokens", image, HIDDEN)
    gallery = model.encode_gallery(inputs["target_images"])
    fixture.same("target_features", gallery, UNIT)
    prompts = model.module.query_tokens.expand(4, -1, -1)
    first = model.module.fusion.with_image(prompts, image, ids, mask)
    fixture.same("fusion_last_hidden_state", first, HIDDEN)
    side = model.module.fusion if model.module.text is None else model.module.text
    second = side.without_image(first[:, :32], ids, mask)
    fixture.same("text_pass_last_hidden_state", second, HIDDEN)
    queries = model.fuse(image, ids, mask)
    fixture.same("query_features", queries, UNIT)
    fixture.same("similarity", model.score(queries, gallery), UNIT)


@torch.inference_mode()
def test_texts_prompts_and_one_query(golden):
    fixture = Golden(golden / "sprc")
    model = load(fixture, fixture.words(), "weights.safetensors")
    texts = [entry["text"] for entry in fixture.json("captions.json")]
    ids, mask = model.tokens(texts)
    assert torch.equal(ids, fixture.inputs["input_ids"])
    assert torch.equal(mask, fixture.inputs["attention_mask"])
    prompts = model.module.prompt_tokens.expand(4, -1, -1)
    hidden = model.module.fusion.prompted_text(prompts, ids, mask)
    fixture.same("rtc_last_hidden_state", hidden, HIDDEN)
    gallery = model.encode_gallery(fixture.inputs["target_images"])
    references = fixture.inputs["reference_images"]
    fixture.same("reference_features", model.encode_gallery(references), UNIT)
    tokens = model.module.image_tokens(fixture.inputs["target_images"])
    fixture.same("target_image_tokens", tokens, HIDDEN)
    alone = model.encode_queries(references[:1], torch.tensor([0]), texts[:1])
    fixture.same("similarity_single_query", model.score(alone, gallery)[0], UNIT)


@torch.inference_mode()
def test_the_vision_tower_of_blip_2(golden):
    """The tower alone, another set of sizes, against golden/eva_vit."""
    fixture = Golden(golden / "eva_vit")
    tensors = read_checkpoint(str(fixture.folder / "weights.safetensors")).tensors
    width = fixture.json("config.json")["width"]
    borrowed = Golden(golden / "sprc")
    file = str(borrowed.folder / "weights.safetensors")
    rest = read_checkpoint(file).section(AUTHORS_KEY)
    kept = {k: v for k, v in rest.items() if not k.startswith(("visual_encoder.", "ln_vision."))}
    kept = {
        key: value[:, :width]
        if "crossattention.self" in key and value.ndim == 2 and "query" not in key
        else value
        for key, value in kept.items()
    }
    tensors = {**kept, **tensors}
    model = load_qformer(tensors, sizes_of(tensors, "eva_vit", HEADS), "eva_vit").eval()
    fixture.same("ln_vision_tokens", model.image_tokens(fixture.inputs["images"]), HIDDEN)


def test_the_maximum_is_taken_in_blocks_and_equals_the_whole(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    queries = torch.randn(7, 16, generator=rng)
    gallery = torch.randn(29, 32, 16, generator=rng)
    whole = torch.einsum("qd,nvd->qnv", queries, gallery).amax(-1)
    for limit in (1, 7 * 32 * 4, 1 << 22):
        monkeypatch.setattr("dafm_ray.models.sprc.SCORES_AT_ONCE", limit)
        assert torch.allclose(Sprc.score(queries, gallery), whole, atol=1e-5)


@pytest.mark.parametrize("second_stage", [False, True])
def test_full_size_keys_and_shapes_are_those_of_the_real_files(golden, second_stage):
    with torch.device("meta"):
        expected = shapes(PromptedQFormer(EVA_G, second_stage).state_dict())
    folder = "sprc_spn_stage2" if second_stage else "sprc"
    keys = Golden(golden / folder).json("keys_full.json")["keys"]
    below = {key.removeprefix("blip_model."): value for key, value in keys.items()}
    tensors = meta_tensors(below)
    assert sizes_of(tensors, "real") == EVA_G
    found = shapes(renamed_qformer(tensors))
    known = {key for key in found if key in expected}
    assert {key: found[key] for key in known} == expected
    print(f"{folder}: not ours {sorted(set(found) - known)}")
    assert len(set(found) - known) == 0


def test_the_three_terms_of_the_loss(golden):
    fixture = Golden(golden / "sprc")
    model = load(fixture, fixture.words())
    texts = [entry["text"] for entry in fixture.json("captions.json")]
    images = [fixture.inputs[f"{name}_images"] for name in ("reference", "target")]
    terms = model.terms(images[0], texts, images[1], 1.0, model.loss_weights)
    losses = {name: contrastive(contrast) for name, contrast in terms.contrasts.items()}
    losses["align"] = terms.penalties["align"][1]
    rtc = terms.contrasts["rtc"]
    fixture.same("rtc_features", rtc.queries, UNIT)
    fixture.same("rtc_similarity", model.score(rtc.queries, rtc.candidates), UNIT)
    for name, found in losses.items():
        fixture.same(f"loss_{name}", found, LOSS)
    total = losses["itc"] + 0.4 * losses["rtc"] + 0.4 * losses["align"]
    fixture.same("loss_total_cirr", total, LOSS)
    fixture.same("loss_total_fashioniq", sum(losses.values()), LOSS)


def test_the_loss_of_the_second_stage_against_its_bank(golden):
    fixture = Golden(golden / "sprc_spn_stage2")
    model = load(fixture, Golden(golden / "sprc").words())
    inputs = fixture.inputs
    image = model.module.image_tokens(inputs["reference_images"])
    queries = model.fuse(image, inputs["input_ids"], inputs["attention_mask"])
    bank = torch.cat([inputs["target_images"], inputs["reference_images"]])
    scores = model.score(queries, model.encode_gallery(bank)) / model.module.temperature
    fixture.same("loss_qtc", in_batch_contrastive(scores, torch.arange(4)), LOSS)


def contrastive(contrast: Contrast) -> torch.Tensor:
    scores = contrast.scale * Sprc.score(contrast.queries, contrast.candidates)
    return in_batch_contrastive(scores, torch.arange(len(scores)))
