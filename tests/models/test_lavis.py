"""The original salesforce-lavis class against golden numbers and against our own towers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.models.base import ModelId, unit
from dafm_ray.models.checkpoints import Checkpoint, read_checkpoint
from dafm_ray.models.lavis import GPUS, PYTHON, Lavis, check_environment
from dafm_ray.models.qformer import load_qformer, sizes_of
from dafm_ray.models.sprc import AUTHORS_KEY, Sprc
from dafm_ray.models.wordpieces import WordPieces
from tests.models.golden import Golden

HEADS = (4, 4)
REQUIREMENTS = Path(__file__).parents[2] / "requirements-lavis.txt"


@pytest.fixture(scope="module")
def lavis_python(tmp_path_factory):
    """The environment, built as requirements-lavis.txt says; an existing one is taken."""
    if python := os.environ.get(PYTHON):
        return python
    folder = tmp_path_factory.mktemp("lavis")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    for arguments in (["-r", REQUIREMENTS], ["--no-deps", "salesforce-lavis==1.0.2"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    return python


@pytest.fixture
def checkpoint(golden):
    folder = golden / "sprc"
    return read_checkpoint(f"{folder}/tuned_clip_arithmetic.pt+{folder}/vocab.txt")


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(1500)
def test_the_original_class_gives_the_golden_numbers_and_those_of_our_own(
    golden, checkpoint, lavis_python, monkeypatch
):
    monkeypatch.setenv(PYTHON, lavis_python)
    expected = Golden(golden / "sprc", outputs="outputs_blip2_itc.safetensors")
    original = Lavis.of_checkpoint(checkpoint, "sum", HEADS)
    images = expected.inputs["target_images"]
    features = original.encode_gallery(images)
    expected.same("image_features", features, atol=1e-5)
    captions = [caption["text"] for caption in expected.json("captions.json")]
    text = Lavis(original.actor, original.sizes, "text")
    text_BD = text.encode_queries(images, torch.arange(4), captions)
    expected.same("text_features", text_BD, atol=1e-5)
    expected.same("itc_similarity_text_to_image", Lavis.score(text_BD, features), atol=1e-5)
    tensors = checkpoint.section(AUTHORS_KEY)
    sizes = sizes_of(tensors, checkpoint.where, HEADS)
    module = load_qformer(tensors, sizes, checkpoint.where).eval()
    with torch.inference_mode():
        ours = Sprc(module, sizes, "base", WordPieces()).encode_gallery(images)
    assert torch.allclose(ours, features, atol=1e-5)
    image = Lavis(original.actor, original.sizes, "image")
    reference = torch.tensor([2, 0, 0, 3])
    image_BD = image.encode_queries(images, reference, captions)
    assert torch.allclose(image_BD, unit(features.mean(1))[reference], atol=1e-6)
    both = original.encode_queries(images, reference, captions)
    assert torch.allclose(both, unit(text_BD + image_BD), atol=1e-6)
    lacking = {
        key: t for key, t in checkpoint.tensors.items() if not key.endswith("ln_vision.bias")
    }
    with pytest.raises(DataError, match=r"lacks 1 weights: ln_vision.bias"):
        Lavis.of_checkpoint(replace(checkpoint, tensors=lacking), "sum", HEADS)


def test_without_its_environment_there_is_one_clear_message(checkpoint, monkeypatch):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(ConfigError, match=f"requirements-lavis.txt .* set {PYTHON}"):
        Lavis.of_checkpoint(checkpoint, "text", HEADS)


def test_random_weights_are_refused():
    with pytest.raises(ConfigError, match="needs a weights file"):
        Lavis.load(ModelId("lavis", "sum", "random"))


def test_captions_are_cleaned_as_lavis_does():
    model = Lavis(None, Sprc.load(ModelId("sprc", "base", "random-tiny")).sizes, "text")
    assert model.caption(["Has a (red) Dot!", "is 2:1"]) == "has a red dot and is 2 1"
    assert len(model.caption(["word " * 90]).split()) == 50


def test_files_of_other_models_are_refused():
    with pytest.raises(DataError, match="holds no model"):
        Lavis.of_checkpoint(Checkpoint({}, {}, "x.pt"), "text")


def test_an_environment_without_lavis_is_named():
    with pytest.raises(ConfigError, match=r"lacks what `lavis` needs .*salesforce-lavis"):
        check_environment(sys.executable)


def test_its_pins_are_those_of_this_package():
    def pins(name):
        lines = (REQUIREMENTS.parent / name).read_text().splitlines()
        return {line.partition("==")[0]: line for line in lines if "==" in line}

    theirs, ours = pins("requirements-lavis.txt"), pins("constraints.txt")
    for name in ("ray", "torch", "torchvision", "numpy"):
        assert theirs[name] == ours[name]


def test_gpus_of_the_actor_are_a_number(monkeypatch):
    assert Lavis.gpus_elsewhere() == 0
    monkeypatch.setenv(GPUS, "two")
    with pytest.raises(ConfigError, match="DAFM_LAVIS_GPUS=two"):
        Lavis.gpus_elsewhere()
