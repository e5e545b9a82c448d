import numpy as np
import pytest
import torch

from dafm_ray.errors import DataError, MachineError
from dafm_ray.models.registry import load_model
from dafm_ray.tiles.forward import Forward, device_of, precision_of
from tests.samples import picture

FAMILIES = (
    "clip4cir:sum",
    "clip4cir:combiner",
    "tgcir:base",
    "blip4cir:stage1",
    "biblip4cir:sum",
    "sprc:base",
    "zeroshot:text",
)
IMAGES = [picture(n) for n in range(5)]
INDEX = [0, 0, 1, 2, 2, 2, 3, 4]
CAPTIONS = [(f"change {n}",) for n in range(len(INDEX))]


def forward(name: str, precision: str = "fp32", batch: int = 64, device: str = "cpu") -> Forward:
    return Forward(load_model(f"{name}@random-tiny"), device, precision, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_any_size_give_the_same_features(name):
    whole = forward(name)
    queries, gallery = whole(IMAGES, INDEX, CAPTIONS), whole(IMAGES, range(5))
    for batch in (1, 3):
        parts = forward(name, batch=batch)
        assert np.allclose(parts(IMAGES, INDEX, CAPTIONS), queries, atol=1e-5)
        assert np.allclose(parts(IMAGES, range(5)), gallery, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_what_shows_an_unusable_image_is_nan_and_the_rest_is_as_before(batch):
    model = forward("clip4cir:sum", batch=batch)
    images = [*IMAGES[:2], "the file is empty", *IMAGES[3:]]
    queries, gallery = model(images, INDEX, CAPTIONS), model(images, range(5))
    assert np.isnan(queries).all(axis=1).tolist() == [index == 2 for index in INDEX]
    assert np.isnan(gallery).all(axis=1).tolist() == [n == 2 for n in range(5)]
    kept = [n != 2 for n in range(5)]
    assert np.allclose(gallery[kept], model(IMAGES, range(5))[kept], atol=1e-5)
    text = forward("zeroshot:text", batch=batch)
    assert np.isfinite(text(images, INDEX, CAPTIONS)).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_gives_nearly_the_same_float32_features(name, precision):
    full, half = forward(name), forward(name, precision)
    for arguments in ((IMAGES, INDEX, CAPTIONS), (IMAGES, range(5))):
        exact, rounded = full(*arguments), half(*arguments)
        assert rounded.dtype == np.float32
        assert not np.array_equal(exact, rounded)
        assert (exact * rounded).sum(-1).min() > 0.995
        assert np.allclose(np.linalg.norm(rounded, axis=-1), 1, atol=1e-5)


def test_features_that_are_no_numbers_are_refused():
    model = forward("clip4cir:sum", "fp16")
    with torch.no_grad():
        model.model.module.CLIP.visual.conv1.weight.fill_(7e4)
    with pytest.raises(DataError, match="no numbers in fp16; use precision bf16"):
        model(IMAGES, range(5))
    assert np.isnan(model(["the file is empty"], [0])).all()


def test_a_full_gpu_ends_in_one_message(monkeypatch):
    model = forward("clip4cir:sum", batch=3)

    def full(images):
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(model.model, "encode_gallery", full)
    with pytest.raises(MachineError, match="with a batch of 3; set a smaller batch"):
        model(IMAGES, range(5))


def test_old_gpus_get_fp16(monkeypatch):
    emulated = {"including_emulation": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **asked: asked == emulated)
    assert precision_of("auto", "cuda") == "fp16"


def test_precision_of_a_cpu_is_float32_unless_asked():
    assert precision_of("auto", "cpu") == "fp32"
    assert precision_of("bf16", "cpu") == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has a GPU")
def test_a_gpu_that_torch_does_not_see_is_named():
    assert device_of(0) == "cpu"
    with pytest.raises(MachineError, match="num_gpus to 0"):
        device_of(0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_gives_the_features_of_a_cpu(name):
    on_cpu, on_gpu = forward(name), forward(name, device="cuda", batch=3)
    half = forward(name, precision_of("auto", "cuda"), device="cuda", batch=3)
    for arguments in ((IMAGES, INDEX, CAPTIONS), (IMAGES, range(5))):
        exact = on_cpu(*arguments)
        assert np.allclose(on_gpu(*arguments), exact, atol=1e-3)
        assert (exact * half(*arguments)).sum(-1).min() > 0.99
