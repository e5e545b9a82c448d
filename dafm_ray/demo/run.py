"""The whole way on the icons: encode, tiles, fusion, evaluation, report.

The sub-models are tiny and their trained weights ship with the package. The fusion and the convex
weights beside it learn from the val split; the report is on the test split, whose concepts no model
has seen.
"""

import importlib.resources
import os
from collections.abc import Callable
from pathlib import Path

import torch

from dafm_ray.config import (
    STATIC_FUSIONS,
    DatasetConfig,
    EvaluateConfig,
    FusionConfig,
    ModelConfig,
    PrecomputeConfig,
    load_config,
)
from dafm_ray.datasets.registry import load_dataset
from dafm_ray.finetune.config import FinetuneConfig
from dafm_ray.finetune.trainer import finetune, save_weights
from dafm_ray.fusion.train import train_fusion
from dafm_ray.models.registry import load_model
from dafm_ray.report.evaluate import Evaluation, evaluate
from dafm_ray.tiles.precompute import precompute_together

TOWERS = "blip4cir_towers"
STAGES = {
    TOWERS: (),
    "blip4cir": ("model=blip4cir:stage1@{out}/blip4cir_towers/weights.safetensors",),
    "sprc": ("scratch.vision={out}/blip4cir/weights.safetensors",),
    "tgcir": (),
    "clip4cir_sum": (),
}
"""Trainings in their order, and where one takes up what another has learnt."""

SHIPPED = "package://dafm_ray.demo/weights"
BATCH = 64


def demo_models(weights: str = SHIPPED) -> tuple[ModelConfig, ...]:
    """The sub-models of the demo; the single-modality ones use the towers of CLIP4CIR.

    Their batch is fixed, so that features do not depend on how fast a machine is.
    """
    ids = {
        "clip4cir-sum": f"clip4cir:sum@{weights}/clip4cir_sum.safetensors",
        "tgcir": f"tgcir:base@{weights}/tgcir.safetensors",
        "blip4cir": f"blip4cir:stage1@{weights}/blip4cir.safetensors",
        "sprc": f"sprc:base@{weights}/sprc.safetensors",
        "image-only": f"zeroshot:image@{weights}/clip4cir_sum.safetensors",
        "text-only": f"zeroshot:text@{weights}/clip4cir_sum.safetensors",
    }
    return tuple(ModelConfig(name, id, batch=BATCH) for name, id in ids.items())


def run_demo(out: Path, from_scratch: bool, say: Callable[[str], None]) -> Evaluation:
    """Run the demo; a second run finds its tiles.

    Args:
        out: folder of stores and results.
        from_scratch: train the sub-models first instead of using the weights that ship.
        say: receives a line a step.
    """
    weights, stores = SHIPPED, out
    if from_scratch:
        weights, stores = str(train_demo_weights(out / "training", say)), out / "from-scratch"
    say("icons val and test: features and similarity tiles")
    configs = [
        PrecomputeConfig(
            dataset=DatasetConfig("icons", split),
            models=demo_models(weights),
            store=str(stores / split),
        )
        for split in ("val", "test")
    ]
    datasets = [load_dataset(config.dataset) for config in configs]
    blocks = sum(outcome.blocks for outcome in precompute_together(configs, datasets))
    say(f"  {blocks} blocks computed, the rest was there")
    say("fusion: convex weights and LightFusion learn from icons val")
    fusion = train_fusion(
        FusionConfig(
            store=str(stores / "val"),
            validation=str(stores / "test"),
            protocol="train->val",
            out=str(stores / "fusion"),
        )
    )
    say("evaluation on icons test")
    return evaluate(
        EvaluateConfig(
            store=str(stores / "test"),
            out=str(stores / "report"),
            fusions=(*STATIC_FUSIONS, fusion),
        )
    )


def train_demo_weights(out: Path, say: Callable[[str], None]) -> Path:
    """Train the demo's sub-models on the icons' train split; returns the folder of their weights.

    The weights are written as float16; a run of the same folder goes on where it stopped.
    """
    folder = out / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    cpus = min(2, os.cpu_count() or 1)
    for stage, starts in STAGES.items():
        say(f"training {stage}")
        file = importlib.resources.files("dafm_ray.demo") / f"{stage}.yaml"
        taken_up = [start.format(out=out) for start in starts]
        overrides = [f"out={out / stage}", f"cpus_per_worker={cpus}", *taken_up]
        config = load_config(FinetuneConfig, str(file), overrides)
        family, _, _ = config.model.partition("@")
        trained = load_model(f"{family}@{finetune(config).weights}")
        if stage != TOWERS:
            save_weights(trained, folder / f"{stage}.safetensors", torch.float16)
    return folder
