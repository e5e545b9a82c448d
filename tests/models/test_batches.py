"""An item's features do not depend on its batch, whatever its text and picture."""

import pytest
import torch

from dafm_ray.models.registry import load_model
from tests.samples import picture

MODELS = (
    "clip4cir:sum",
    "clip4cir:combiner",
    "tgcir:base",
    "tgcir:spn",
    "blip4cir:stage1",
    "biblip4cir:sum",
    "biblip4cir:combiner",
    "sprc:base",
    "sprc:spn",
)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_one_query_equals_a_batch_whatever_its_text_and_picture(name):
    model = load_model(f"{name}@random-tiny")
    modes = ("L", "RGBA", "P")
    images = torch.stack([model.preprocess(picture(n).convert(m)) for n, m in enumerate(modes)])
    texts = [model.caption([text]) for text in ("A red one and blue!", "", "word " * 300)]
    together = model.encode_queries(images, torch.tensor([2, 0, 2]), texts)
    alone = [
        model.encode_queries(images[i : i + 1], torch.tensor([0]), [text])
        for i, text in zip((2, 0, 2), texts, strict=True)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    gallery = model.encode_gallery(images)
    vectors = (32,) if name.startswith("sprc") else ()
    assert gallery.shape == (3, *vectors, model.sizes.embed_dim)
    single = torch.cat([model.encode_gallery(images[n : n + 1]) for n in range(3)])
    assert torch.allclose(gallery, single, atol=1e-5)
