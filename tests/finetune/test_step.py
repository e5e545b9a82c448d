"""A step is the same however its batch is cut: into chunks, or over workers."""

import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from dafm_ray.config import DatasetConfig
from dafm_ray.errors import DataError
from dafm_ray.finetune.config import FinetuneConfig, MiningConfig, PreferenceConfig
from dafm_ray.finetune.step import step
from dafm_ray.finetune.trainer import build, objective_of, save_weights
from tests.samples import image_folder

VIT = {
    "embed_dim": 32,
    "image_size": 32,
    "vision_layers": 1,
    "vision_width": 64,
    "patch_size": 16,
    "context_length": 12,
    "text_width": 32,
    "text_heads": 1,
    "text_layers": 1,
}


@pytest.fixture
def config(tmp_path):
    data = DatasetConfig("folder", root=str(image_folder(tmp_path / "images", 24, 16)))
    return FinetuneConfig(
        train=data,
        validation=data,
        model="zeroshot:text@scratch",
        out=str(tmp_path / "out"),
        scratch={"towers": VIT},
        batch_size=16,
        shift=1,
        seed=3,
    )


def one_step(config, chunk=0, rank=0, clip=0.0, precision="fp32", wrap=lambda module: module):
    """Loss and gradients of the first step of plain descent."""
    torch.manual_seed(0)
    model = build(replace(config, precision=precision))
    objective = objective_of(replace(config, precision=precision), model, rank)
    objective.begin(0)
    model.module.train()
    learning = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    optimiser = torch.optim.SGD(learning.values(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    batch = next(iter(objective.batches(0)))
    loss = step(wrap(objective), objective, batch, optimiser, scaler, chunk, clip)
    moved = {name: (before[name] - p.detach()) for name, p in learning.items()}
    return loss, moved


def assert_alike(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, gradient in one[1].items():
        assert torch.allclose(gradient, other[1][name], atol=tolerance), name


@pytest.mark.parametrize("model", ["zeroshot:text", "zeroshot:sum", "tgcir:base"])
@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_take_the_same_step(config, model, chunk):
    """TG-CIR's penalties compare the rows of a chunk, so they are off."""
    off = {"mask": 0.0, "ortho": 0.0, "ckd": 0.0, "kl": 0.0} if "tgcir" in model else {}
    config = replace(config, model=f"{model}@scratch", loss=off)
    whole = one_step(config)
    assert max(float(gradient.abs().max()) for gradient in whole[1].values()) > 1e-3
    assert_alike(whole, one_step(config, chunk))


def test_chunks_hold_fewer_activations(config):
    seen = []
    model = build(config)
    objective = objective_of(config, model, 0)

    def look(_module, arguments, terms):
        if torch.is_grad_enabled():
            seen.append(len(arguments[0]))

    objective.register_forward_hook(look)
    optimiser = torch.optim.SGD(model.module.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step(objective, objective, next(iter(objective.batches(0))), optimiser, scaler, 4)
    assert seen == [4, 4, 4, 4]


def test_gradients_are_clipped(config):
    for chunk in (0, 4):
        _, moved = one_step(config, chunk, clip=1e-3)
        length = torch.stack([(g**2).sum() for g in moved.values()]).sum().sqrt()
        assert float(length) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("chunk", [0, 4])
def test_fp16_takes_nearly_the_same_step(config, chunk):
    whole = one_step(config)
    half = one_step(config, chunk, precision="fp16")
    assert half[0] == pytest.approx(whole[0], rel=1e-2)
    one, other = (torch.cat([g.flatten() for g in found[1].values()]) for found in (whole, half))
    assert float((one - other).norm() / one.norm()) < 0.02


def test_a_loss_that_is_no_number_stops(config):
    model = build(config)
    with torch.no_grad():
        model.towers.module.logit_scale.fill_(float("nan"))
    objective = objective_of(config, model, 0)
    optimiser = torch.optim.SGD(model.module.parameters(), lr=1.0)
    batch = next(iter(objective.batches(0)))
    with pytest.raises(DataError, match="the loss is nan; lower learning_rate"):
        step(objective, objective, batch, optimiser, torch.amp.GradScaler("cpu", enabled=False))


def _worker(rank, configs, port, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ddp = nn.parallel.DistributedDataParallel
    for n, config in enumerate(configs):
        for chunk in (0, 3):
            shared = replace(config, workers=2)
            found = one_step(
                shared, chunk, rank, wrap=lambda m: ddp(m, find_unused_parameters=True)
            )
            torch.save(found, f"{out}/{n}-{chunk}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_workers_take_the_step_of_one(config, tmp_path):
    config = replace(config, shift=0)
    save_weights(build(config), tmp_path / "clip.safetensors")
    trained = replace(
        config,
        model=f"zeroshot:sum@{tmp_path / 'clip.safetensors'}",
        scratch={},
        parts=("CLIP.transformer",),
    )
    window = MiningConfig(ranks=(1, 8))
    configs = [
        config,
        replace(trained, preference=PreferenceConfig("corrected", negatives=window)),
        replace(trained, preference=PreferenceConfig("listwise")),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (configs, port, str(tmp_path)), nprocs=2)
    for n, config in enumerate(configs):
        alone = one_step(config)
        for chunk in (0, 3):
            for rank in (0, 1):
                assert_alike(alone, torch.load(tmp_path / f"{n}-{chunk}-{rank}.pt"))
