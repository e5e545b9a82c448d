from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.finetune.trainer import save_weights
from dafm_ray.models.base import ModelId, unit
from dafm_ray.models.clip_towers import TINY, build_towers, token_ids
from dafm_ray.models.initialisation import seeded
from dafm_ray.models.inversion import PREFIX, Phi, encode_with_words, optimised_words
from dafm_ray.models.registry import load_model, resolve
from dafm_ray.models.zeroshot import OwnTowers, ZeroShot
from tests.models.tiny_clip import register
from tests.samples import picture


def images(model, *seeds):
    return torch.stack([model.preprocess(picture(seed)) for seed in seeds])


@pytest.fixture(scope="module")
def searle():
    return load_model("zeroshot:searle@random-tiny")


@torch.inference_mode()
def test_the_sum_weighs_both_normalised_features():
    text, image = (load_model(f"zeroshot:{v}@random-tiny") for v in ("text", "image"))
    references = images(image, 1, 2)
    both = references, torch.tensor([1, 0, 1]), ["red", "blue", "green"]
    one, other = image.encode_queries(*both), text.encode_queries(*both)
    for variant, share in (("sum", 0.5), ("sum=0.2", 0.2), ("sum=1", 1.0)):
        model = load_model(f"zeroshot:{variant}@random-tiny")
        expected = unit(share * one + (1 - share) * other)
        assert torch.allclose(model.encode_queries(*both), expected, atol=1e-6)


@pytest.mark.parametrize(
    "variant", ["sum=2", "sum=-0.1", "sum=much", "image=0.5", "sums", "oti=0", "oti=1.5"]
)
def test_a_share_is_between_0_and_1(variant):
    with pytest.raises(ConfigError, match="zeroshot offers the variants image, text, sum"):
        resolve(f"zeroshot:{variant}@random-tiny")


@torch.inference_mode()
def test_a_word_in_place_of_the_pseudo_word_reads_like_the_word(searle):
    towers = searle.towers
    [cat] = token_ids("cat")
    word = towers.token_embedding.weight[cat]
    rests = ["that is red", ""]
    found = encode_with_words(towers, rests, word.expand(2, -1))
    written = [f"{PREFIX} cat {rest}".rstrip() for rest in rests]
    assert torch.allclose(found, searle.encode_texts(written), atol=1e-6)
    assert not torch.allclose(found, searle.encode_texts([f"{PREFIX} dog that is red", "dog"]))
    again = encode_with_words(towers, ["with a $ sign"], word[None])
    assert torch.allclose(again, searle.encode_texts([f"{PREFIX} cat with a $ sign"]), atol=1e-6)
    after = searle.encode_texts(["a photo of $"])
    assert torch.allclose(after, towers.encode_tokens(towers.tokens(["a photo of $"])))


def test_an_optimised_word_says_more_of_its_image(searle):
    searle.module.eval()
    towers = searle.towers
    with torch.inference_mode():  # as in the encoding pools
        features = towers.encode_images(images(searle, 1, 2, 3))
        start = optimised_words(towers, features, steps=1)
        words = optimised_words(towers, features, steps=40)
        near = [
            cosine_similarity(encode_with_words(towers, [""] * 3, word), features)
            for word in (start, words)
        ]
        assert (near[1] > near[0] + 0.05).all()
        alone = optimised_words(towers, features[1:2], steps=40)
        assert torch.allclose(alone, words[1:2], atol=1e-3)
    assert all(p.grad is None for p in searle.module.parameters())


def test_the_steps_of_the_optimisation_are_chosen(searle):
    references, index = images(searle, 1), torch.tensor([0])
    few, more = (load_model(f"zeroshot:oti={n}@random-tiny") for n in (2, 9))
    assert load_model("zeroshot:oti@random-tiny").steps == 350
    caption = few.caption(["red"])
    with torch.inference_mode():
        features = few.towers.encode_images(references)
        expected = few.read(optimised_words(few.towers, features, 2), [caption])
        assert torch.equal(few.encode_queries(references, index, [caption]), expected)
        assert not torch.equal(more.encode_queries(references, index, [caption]), expected)


@torch.inference_mode()
def test_both_orders_of_the_captions_count(searle):
    references, index = images(searle, 1), torch.tensor([0])
    one, other = searle.caption(["red", "no belt"]), searle.caption(["no belt", "red"])
    assert one == "red and no belt\nno belt and red"
    found = [searle.encode_queries(references, index, [text]) for text in (one, other)]
    assert torch.allclose(*found, atol=1e-6)
    read = [searle.encode_queries(references, index, [text]) for text in one.split("\n")]
    assert torch.allclose(found[0], unit(read[0] + read[1]), atol=1e-6)
    assert searle.caption(["red", "red"]) == "red and red"
    assert torch.allclose(found[0].norm(dim=1), torch.ones(1))


@torch.inference_mode()
def test_the_hidden_text_skips_the_projection():
    hidden = load_model("zeroshot:hidden@random-tiny")
    projection = hidden.towers.module.text_projection
    found = hidden.compose(None, ["red", "blue"])
    assert hidden.towers.module.text_projection is projection
    projected = hidden.encode_texts(["red", "blue"])
    cosines = cosine_similarity(found @ projection, projected)
    assert torch.allclose(cosines, torch.ones(2), atol=1e-6)
    assert not hidden.uses_reference


def test_the_hidden_text_must_be_as_wide_as_the_space():
    sizes = replace(TINY, embed_dim=16)
    towers = OwnTowers(seeded(0, lambda: build_towers(sizes)), sizes, None)
    with pytest.raises(ConfigError, match=r"text width \(32\) must be the embedding width \(16\)"):
        ZeroShot(towers, "hidden")


def test_a_network_of_textual_inversion_lies_in_its_own_file(tmp_path, searle):
    clip = tmp_path / "clip.pt"
    tensors = load_model("clip4cir:sum@random-tiny").module.CLIP.state_dict()
    torch.save({"CLIP": tensors}, clip)
    phi = Phi(TINY.embed_dim, TINY.text_width)
    torch.save({"Phi": phi.state_dict()}, tmp_path / "phi.pt")
    loaded = load_model(f"zeroshot:searle@{clip}+{tmp_path / 'phi.pt'}")
    features = torch.randn(3, TINY.embed_dim)
    phi.eval()
    assert torch.equal(loaded.words(features), phi(features))
    with pytest.raises(DataError, match="holds no Phi weights"):
        load_model(f"zeroshot:searle@{clip}")
    new = ZeroShot.start(ModelId.parse(f"zeroshot:searle@{clip}"), {}, [], 0)
    assert new.module.Phi is not None


def test_long_sentences_are_told(searle):
    text = load_model("zeroshot:text@random-tiny")
    fitting = " ".join(["red"] * 75)
    assert not text.cuts(fitting)
    assert text.cuts(f"{fitting} red")
    assert searle.cuts(fitting)


KINDS = ["Tiny-ViT", "Tiny-ResNet", "Tiny-custom-text", "Tiny-timm", "Tiny-coca"]


@pytest.mark.parametrize("kind", [*KINDS, "Tiny-BERT"])
def test_every_kind_of_open_clip_model_is_searched_without_training(monkeypatch, tmp_path, kind):
    register(monkeypatch, tmp_path)
    for variant in ("image", "text", "sum=0.3", "searle", "oti"):
        parsed = ModelId.parse(f"zeroshot:{variant}@{kind}/random")
        model = ZeroShot.start(parsed, {}, [], 0)
        model.module.requires_grad_(False).eval()
        caption = model.caption(["red", "a dress"])
        with torch.inference_mode():
            gallery = model.encode_gallery(images(model, 1, 2, 3))
            queries = model.encode_queries(images(model, 4), torch.tensor([0, 0]), [caption] * 2)
        assert gallery.shape == (3, 8)
        assert queries.shape == (2, 8)
        assert torch.allclose(queries.norm(dim=1), torch.ones(2))
        assert not model.cuts("a red dress") or variant in ("searle", "oti")
        assert model.cuts("red " * 90)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_open_clip_model_is_built_again_from_its_file(monkeypatch, tmp_path, kind):
    register(monkeypatch, tmp_path)
    model = ZeroShot.start(ModelId.parse(f"zeroshot:searle@{kind}/random"), {}, [], 3)
    with torch.no_grad():
        next(model.module.CLIP.parameters()).mul_(1.5)
    save_weights(model, tmp_path / "weights.safetensors")
    model.module.eval()
    again = load_model(f"zeroshot:searle@{tmp_path / 'weights.safetensors'}")
    references, index = images(model, 4), torch.tensor([0])
    assert torch.equal(references, images(again, 4))
    with torch.inference_mode():
        found = [one.encode_queries(references, index, ["red"]) for one in (model, again)]
    assert torch.equal(*found)
