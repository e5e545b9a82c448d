import json

import pytest
import torch
from safetensors.torch import load_file

from dafm_ray.errors import ConfigError
from dafm_ray.finetune.losses import in_batch_contrastive
from dafm_ray.models.base import ModelId
from dafm_ray.models.checkpoints import read_checkpoint
from dafm_ray.models.clip4cir import Clip4Cir, ClipPair, Combiner, combiner_of
from dafm_ray.models.clip_towers import RN50X4, TowerSizes, build_towers, load_towers
from dafm_ray.models.registry import load_model
from tests.samples import picture

TEXT_HEADS = 2
"""Of the golden towers; no state dict stores it (golden/clip4cir/config.json)."""


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "clip4cir"


@pytest.fixture(scope="module")
def expected(folder):
    return load_file(folder / "outputs.safetensors")


@pytest.fixture(scope="module")
def inputs(folder):
    return load_file(folder / "inputs.safetensors")


def load(folder, variant, files="tuned_clip_best.pt+combiner_cuda_tagged.pt"):
    checkpoint = read_checkpoint("+".join(str(folder / name) for name in files.split("+")))
    tensors = checkpoint.section("CLIP")
    sizes = TowerSizes.from_weights(tensors, TEXT_HEADS)
    combiner = combiner_of(checkpoint) if variant == "combiner" else None
    model = Clip4Cir(ClipPair(load_towers(tensors, sizes, "golden"), combiner), sizes, variant)
    model.module.eval()
    return model


def close(name, found, expected, atol=2e-5, rtol=1e-4):
    difference = (found - expected).abs().max().item()
    print(f"golden/clip4cir {name}: largest difference {difference:.2g}")
    assert torch.allclose(found, expected, atol=atol, rtol=rtol), (name, difference)


@torch.inference_mode()
@pytest.mark.parametrize(
    "files", ["tuned_clip_best.pt+combiner.pt", "weights.safetensors"], ids=["pt", "safetensors"]
)
@pytest.mark.parametrize("variant", ["sum", "combiner"])
def test_equals_the_published_implementation(folder, inputs, expected, variant, files):
    model = load(folder, variant, files)
    images = model.encode_images(inputs["images"])
    texts = model.encode_tokens(inputs["tokens"].long())
    queries = model.fuse(images, texts)
    gallery = model.encode_gallery(inputs["images"])
    close("image_features", images, expected["image_features"])
    close("text_features", texts, expected["text_features"])
    close("index_features", gallery, expected["index_features"])
    close(f"query_{variant}", queries, expected[f"query_{variant}"])
    scores = model.score(queries, gallery)
    close(f"similarity_{variant}", scores, expected[f"similarity_{variant}"])


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["sum", "combiner"])
def test_one_query_at_a_time_equals_the_batch(folder, inputs, expected, variant):
    model = load(folder, variant)
    for row in range(4):
        images = model.encode_images(inputs["images"][row : row + 1])
        texts = model.encode_tokens(inputs["tokens"][row : row + 1].long())
        close("one", model.fuse(images, texts)[0], expected[f"query_{variant}"][row])


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["sum", "combiner"])
def test_the_training_loss_is_the_published_one(folder, inputs, expected, variant, monkeypatch):
    model = load(folder, variant)
    tokens = inputs["tokens"].long()  # what they were made of is not recorded
    monkeypatch.setattr(model, "encode_texts", lambda _: model.encode_tokens(tokens))
    targets = inputs["images"][[1, 2, 3, 0]]
    rank = model.terms(inputs["images"], [""] * 4, targets, 100.0, {}).contrasts["rank"]
    logits = rank.scale * model.score(rank.queries, rank.candidates)
    close(f"train_logits_{variant}", logits, expected[f"train_logits_{variant}"], atol=2e-3)
    loss = in_batch_contrastive(logits, torch.arange(4))
    close(f"train_loss_{variant}", loss, expected[f"train_loss_{variant}"], atol=1e-4)


def test_full_size_keys_and_shapes_are_those_of_the_real_files(folder):
    with torch.device("meta"):
        pair = ClipPair(build_towers(RN50X4), Combiner(640, 2560, 5120))
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in pair.state_dict().items()
    }
    full = json.loads((folder / "keys_full.json").read_text())
    assert found == full["keys"]
    assert sum(p.numel() for p in pair.parameters()) == full["meta"]["parameters"]["total"]


def test_second_stage_keys_of_spn4cir(folder):
    with torch.device("meta"):
        towers = build_towers(RN50X4)
    keys = json.loads((folder / "keys_full_spn_stage2.json").read_text())["keys"]
    found = {f"clip.{key}": list(tensor.shape) for key, tensor in towers.state_dict().items()}
    assert found == {key: shape for key, (shape, _) in keys.items()}


def test_files_of_spn4cir_load(tmp_path):
    towers = build_towers(TowerSizes(32, 64, (1, 1, 1, 1), 8, 0, 77, 49408, 64, 1, 1))
    state = {f"clip.{key}": tensor for key, tensor in towers.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "stage2.pt")
    loaded = load_model(f"clip4cir:sum@{tmp_path / 'stage2.pt'}")
    for key, tensor in towers.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[f"CLIP.{key}"], tensor)


def test_sizes_in_openais_own_files_are_no_weights(tmp_path):
    towers = build_towers(TowerSizes(32, 64, (1, 1, 1, 1), 8, 0, 77, 49408, 64, 1, 1))
    extra = {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(49408)}
    torch.save({"CLIP": {**towers.state_dict(), **extra}}, tmp_path / "clip.pt")
    assert load_model(f"clip4cir:sum@{tmp_path / 'clip.pt'}").sizes.image_size == 64


@torch.inference_mode()
def test_queries_that_share_a_reference_equal_queries_alone():
    model = load_model("clip4cir:sum@random-tiny")
    images = torch.stack([model.preprocess(picture(seed)) for seed in (1, 2)])
    captions = ["a red one", "", "word " * 300]
    together = model.encode_queries(images, torch.tensor([1, 0, 1]), captions)
    alone = [
        model.encode_queries(images[i : i + 1], torch.tensor([0]), [text])
        for i, text in zip((1, 0, 1), captions, strict=True)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))


@torch.inference_mode()
def test_single_modalities_ignore_the_other():
    image, text = (load_model(f"zeroshot:{v}@random-tiny") for v in ("image", "text"))
    images = torch.stack([image.preprocess(picture(seed)) for seed in (1, 2)])
    index = torch.tensor([0, 1])
    by_image = image.encode_queries(images, index, ["one", "two"])
    assert torch.equal(by_image, image.encode_queries(images, index, ["three", "four"]))
    assert torch.allclose(by_image, image.encode_gallery(images))
    by_text = text.encode_queries(images, index, ["one", "two"])
    assert torch.equal(by_text, text.encode_queries(images.flip(0), index, ["one", "two"]))
    assert image.uses_reference
    assert not text.uses_reference


def test_unknown_variant_and_malformed_id():
    with pytest.raises(ConfigError, match="offers the variants sum, combiner"):
        load_model("clip4cir:average@random-tiny")
    with pytest.raises(ConfigError, match="not a model id"):
        ModelId.parse("clip4cir@random")


def test_random_weights_follow_the_seed():
    one, same, other = (
        load_model("clip4cir:combiner@random-tiny").module.state_dict(),
        load_model("clip4cir:combiner@random-tiny").module.state_dict(),
        Clip4Cir.random(
            load_model("clip4cir:sum@random-tiny").sizes, "combiner", seed=1
        ).module.state_dict(),
    )
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
