import pytest
import torch
import torch.nn.functional as F

from dafm_ray.errors import DataError
from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.models.base import Contrast, ModelId
from dafm_ray.models.checkpoints import Checkpoint, read_checkpoint
from dafm_ray.models.qformer import (
    EVA_G,
    PromptedQFormer,
    load_qformer,
    renamed_qformer,
    sizes_of,
)
from dafm_ray.models.sprc import AUTHORS_KEY, Sprc, published_tensors
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
    queries = model.module.fuse(image, ids, mask)
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
    queries = model.module.fuse(image, inputs["input_ids"], inputs["attention_mask"])
    bank = torch.cat([inputs["target_images"], inputs["reference_images"]])
    scores = model.score(queries, model.encode_gallery(bank)) / model.module.temperature
    fixture.same("loss_qtc", in_batch_contrastive(scores, torch.arange(4)), LOSS)


def blip2_file(folder, golden, bare=False):
    """BLIP-2's own file and EVA's, with what they hold besides, from the golden tensors."""
    file = golden / "sprc" / "weights.safetensors"
    tensors = read_checkpoint(str(file)).section(AUTHORS_KEY)
    tower = {
        key.removeprefix("visual_encoder."): value
        for key, value in tensors.items()
        if key.startswith("visual_encoder.")
    }
    tower |= {"blocks.39.norm1.weight": torch.ones(1), "head.weight": torch.ones(1)}
    rest = {k: v for k, v in tensors.items() if not k.startswith("visual_encoder.")}
    del rest["prompt_tokens"]
    rest["itm_head.weight"] = torch.ones(2, 1)
    torch.save(rest if bare else {"model": rest, "optimizer": {}}, folder / "blip2.pth")
    torch.save(tower, folder / "eva.pth")
    return tensors, f"{folder}/blip2.pth+{folder}/eva.pth+{golden}/sprc/vocab.txt"


@pytest.mark.parametrize("bare", [False, True])
@torch.inference_mode()
def test_blip_2_is_where_training_starts(golden, tmp_path, bare):
    tensors, weights = blip2_file(tmp_path, golden, bare)
    model_id = ModelId("sprc", "base", weights)
    model, again, other = (Sprc.start(model_id, {}, [], seed) for seed in (1, 1, 2))
    published = load_qformer(tensors, sizes_of(tensors, ""), "").state_dict()
    found = model.module.state_dict()
    assert found.keys() == published.keys()
    same = {key for key in found if torch.equal(found[key], published[key])}
    assert found.keys() - same == {"prompt_tokens"}
    prompts = found["prompt_tokens"]
    assert 0.018 < prompts.std() < 0.022
    assert torch.equal(prompts, again.module.prompt_tokens)
    assert not torch.equal(prompts, other.module.prompt_tokens)
    pooled = Sprc.start(ModelId("sprc", "pooled", weights), {}, [], 1).module.state_dict()
    words = "fusion.embeddings.word_embeddings.weight"
    assert torch.equal(pooled["embeddings.weight"], published[words])
    tower = {key for key in pooled if key.startswith("vision_model.")}
    assert all(torch.equal(pooled[key], published[key]) for key in tower)


def test_blip_2_as_it_was_pre_trained_is_refused_for_search(golden, tmp_path):
    _, weights = blip2_file(tmp_path, golden)
    with pytest.raises(DataError, match=r"no prompt tokens: .* fine-tune it first"):
        Sprc.load(ModelId("sprc", "base", weights))
    with pytest.raises(DataError, match=r"no projections of means: .* fine-tune it first"):
        Sprc.load(ModelId("sprc", "pooled", str(golden / "sprc" / "weights.safetensors")))
    with pytest.raises(DataError, match="holds no vision tower; add its file"):
        Sprc.start(ModelId("sprc", "base", weights.partition("+")[0]), {}, [], 0)


def test_full_size_keys_of_blip_2(golden):
    tensors = meta_tensors(Golden(golden / "sprc").json("keys_full_blip2_pretrain.json")["keys"])
    split = {
        f"model.{key}": value for key, value in tensors.items() if not key.startswith("visual_")
    }
    eva = Golden(golden / "eva_vit").json("keys_full.json")["keys"]
    found = published_tensors(Checkpoint({**split, **meta_tensors(eva)}))
    assert sizes_of(found, "real") == EVA_G
    with torch.device("meta"):
        expected = shapes(PromptedQFormer(EVA_G).state_dict())
    del expected["prompt_tokens"]
    assert shapes(renamed_qformer(found)) == expected


def test_means_without_a_q_former():
    model = Sprc.load(ModelId("sprc", "pooled", "random-tiny"))
    module = model.module.eval()
    image = module.image_tokens(torch.randn(2, 3, 56, 56))
    ids, mask = model.tokens(["a b", ""])
    a, b = module.embeddings.weight[ids[0, 1:3]]
    words = torch.stack([(a + b) / 2, torch.zeros_like(a)])
    assert torch.allclose(module.words(ids, mask), words, atol=1e-6)
    means = image.mean(1)
    query = F.normalize(means @ module.image_proj.weight.T + words @ module.text_proj.weight.T)
    assert torch.allclose(module.fuse(image, ids, mask), query, atol=1e-5)
    candidate = F.normalize(means @ module.vision_proj.weight.T)
    assert torch.allclose(module.candidates(image)[:, 0], candidate, atol=1e-5)
    assert torch.allclose(
        model.score(query, module.candidates(image)), query @ candidate.T, atol=1e-5
    )


def contrastive(contrast: Contrast) -> torch.Tensor:
    scores = contrast.scale * Sprc.score(contrast.queries, contrast.candidates)
    return in_batch_contrastive(scores, torch.arange(len(scores)))
