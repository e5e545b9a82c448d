from dataclasses import replace

import pytest
import torch

from dafm_ray.config import DatasetConfig
from dafm_ray.errors import ConfigError
from dafm_ray.finetune.config import FinetuneConfig, InversionConfig
from dafm_ray.finetune.trainer import build, save_weights, train
from dafm_ray.models.clip_towers import TINY
from dafm_ray.models.registry import load_model
from tests.samples import image_folder


@pytest.fixture
def config(tmp_path):
    root = image_folder(tmp_path / "images", 24, 16)
    (root / "023.png").write_bytes(b"no picture")
    data = DatasetConfig("folder", root=str(root))
    start = load_model("zeroshot:text@random-tiny")
    start.towers.sizes = TINY
    save_weights(start, tmp_path / "clip.safetensors")
    return FinetuneConfig(
        train=data,
        validation=data,
        model=f"zeroshot:searle@{tmp_path / 'clip.safetensors'}",
        out=str(tmp_path / "out"),
        parts=("Phi",),
        inversion=InversionConfig(steps=60, temperature=0.02),
        epochs=30,
        patience=30,
        batch_size=8,
        learning_rate=1e-3,
    )


def test_the_network_learns_the_words_of_the_images(config):
    model, reports = build(config), []
    before = {key: tensor.clone() for key, tensor in model.module.state_dict().items()}
    train(config, model, lambda loss: loss, lambda metrics, state: reports.append((metrics, state)))
    assert reports[-1][0]["loss"] < 0.8 * reports[0][0]["loss"]
    for key, tensor in model.module.state_dict().items():
        assert torch.equal(before[key], tensor) == key.startswith("CLIP."), key
    state = reports[-1][1]
    assert state["objective"]["words"].shape == (23, TINY.text_width)
    assert [item for item, *_ in state["unfit"]] == ["023.png"]


def test_a_run_that_goes_on_takes_the_words_that_were_found(config):
    def run(state=None, stop_after=None):
        model, reports = build(config), []

        def report(metrics, state):
            reports.append((metrics, state))
            if len(reports) == stop_after:
                raise KeyboardInterrupt

        try:
            train(config, model, lambda loss: loss, report, state)
        except KeyboardInterrupt:
            return reports
        return reports

    config = replace(config, epochs=4)
    whole = run()
    broken = run(stop_after=2)
    resumed = run(state=broken[-1][1])
    assert [m for m, _ in whole] == [m for m, _ in broken + resumed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("",)}, r"set parts to \[Phi\]"),
        ({"parts": ("CLIP",)}, r"set parts to \[Phi\]"),
        ({"model": "text", "parts": ("CLIP.transformer",)}, "trains zeroshot:searle"),
    ],
)
def test_only_the_network_is_trained(config, change, message):
    model = config.model.replace("searle", change.get("model", "searle"))
    changed = replace(config, **{**change, "model": model})
    with pytest.raises(ConfigError, match=message):
        train(changed, build(changed), lambda loss: loss, lambda metrics, state: None)
