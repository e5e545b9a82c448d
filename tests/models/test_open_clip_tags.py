import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dafm_ray.errors import DataError
from dafm_ray.models.checkpoints import weights_digest
from dafm_ray.models.open_clip_tags import OpenClipModel, is_tag
from tests.models import tiny_clip
from tests.models.tiny_clip import open_clip
from tests.samples import picture

NAMES = [*tiny_clip.ARCHITECTURES, "Tiny-BERT"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    tiny_clip.register(monkeypatch, tmp_path)


def test_a_tag_is_told_from_a_file(tmp_path, monkeypatch):
    assert is_tag("ViT-B-32/openai")
    assert is_tag("ViT-B-32//data/clip.safetensors")
    assert is_tag("Vit-B-23/openai")  # misspelt: refused by name when it is built
    others = ["random-tiny", "a.pt", "runs/a.pt", "/data/a.pt", "package://dafm_ray/a", "a/b.pt+c"]
    assert not any(is_tag(text) for text in others)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RN50").mkdir()
    (tmp_path / "RN50" / "openai").touch()
    assert not is_tag("RN50/openai")


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_every_kind_of_model_is_what_open_clip_makes_of_it(name):
    model = OpenClipModel.load(f"{name}/random")
    model.module.eval()
    image = model.preprocess(picture(0))
    side = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    assert (image.shape, image.dtype) == ((3, side, side), torch.float32)
    images = torch.stack([image, model.preprocess(picture(1))])
    assert torch.equal(model.encode_images(images), model.module.encode_image(images, False))
    ids = model.tokens(["a red dress", "a " * 50])
    assert (ids.shape, ids.dtype) == ((2, model.context_length), torch.int64)
    features = model.encode_tokens(ids)
    assert torch.equal(features, model.module.encode_text(ids, False))
    assert features.shape == (2, 8)
    seen = []
    model.token_embedding.register_forward_hook(lambda *call: seen.append(call[2].shape[:2]))
    model.encode_tokens(ids)
    assert len(seen) == 1
    assert seen[0][0] == 2
    again = OpenClipModel.load(f"{name}/random")
    again.module.eval()
    assert torch.equal(again.encode_images(images), model.encode_images(images))


def test_weights_of_a_file(tmp_path):
    made = OpenClipModel.load("Tiny-ViT/random", seed=3)
    file = tmp_path / "clip.safetensors"
    save_file(made.module.state_dict(), file)
    loaded = OpenClipModel.load(f"Tiny-ViT/{file}")
    image = loaded.preprocess(picture(0))[None]
    with torch.inference_mode():
        assert torch.equal(loaded.encode_images(image), made.encode_images(image))
    with pytest.raises(DataError, match="cannot build Tiny-ResNet"):
        OpenClipModel.load(f"Tiny-ResNet/{file}")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(DataError, match="cannot build Tiny-ViT"):
        OpenClipModel.load(f"Tiny-ViT/{tmp_path}/bad.pt")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
def test_images_of_every_stored_mode(mode, resize):
    model = OpenClipModel.load("Tiny-ViT/random")
    model.preprocess_config["resize_mode"] = resize
    image = Image.new("I;16", (40, 32)) if mode == "I;16" else picture(0).convert(mode)
    tensor = model.preprocess(image)
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)


def tagged(monkeypatch, tag, file, **values):
    """A tag whose weights are at hand, or not."""
    known = {"file": str(file)} if file else {"hf_hub": "nobody/nothing/"}
    known |= values
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-ViT", {tag: known})


def test_a_tag_decides_on_the_activation_and_the_preprocessing(tmp_path, monkeypatch):
    file = tmp_path / "clip.safetensors"
    save_file(OpenClipModel.load("Tiny-ViT/random").module.state_dict(), file)
    plain = weights_digest(f"Tiny-ViT/{file}")
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    tagged(monkeypatch, "half", file, quick_gelu=True, **half)
    model = OpenClipModel.load("Tiny-ViT/half")
    assert "QuickGELU" in str(model.module.visual)
    white = model.preprocess(Image.new("RGB", (50, 20), "white"))
    assert torch.equal(white, torch.ones(3, 32, 32))
    of_file = OpenClipModel.load(f"Tiny-ViT/{file}")  # its only tag says how images are prepared
    assert of_file.preprocess_config == model.preprocess_config
    json.dumps(model.preprocess_config)
    assert len({plain, weights_digest("Tiny-ViT/half"), weights_digest(f"Tiny-ViT/{file}")}) == 3


def test_digests_are_of_the_weights(tmp_path):
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (weights_digest(f"Tiny-ViT/{tmp_path}/{name}") for name in "abc")
    assert a == b != c
    more = {weights_digest(f"Tiny-ViT/random+{tmp_path}/{name}") for name in "abc"}
    assert len({a, c, weights_digest("Tiny-ViT/random"), *more}) == 5


@pytest.mark.parametrize("ask", [OpenClipModel.load, weights_digest])
def test_what_is_not_there_is_named(ask, monkeypatch):
    with pytest.raises(DataError, match="no architecture 'ViT-B-23'; did you mean 'ViT-B-32'"):
        ask("ViT-B-23/openai")
    with pytest.raises(DataError, match=r"'opena' is neither a file nor a tag of RN50 .*openai"):
        ask("RN50/opena")
    tagged(monkeypatch, "far", None)
    with pytest.raises(DataError, match=r"Tiny-ViT/far are not in the cache .* Tiny-ViT//data/"):
        ask("Tiny-ViT/far")
