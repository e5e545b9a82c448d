"""The whole way on the icons: encode, tiles, fusion, evaluation, report.

The sub-models are tiny and their trained weights ship with the package. Convex weights are
searched on the val split; the report is on the test split, whose concepts no model has seen.
"""

import importlib.resources
from collections.abc import Callable
from pathlib import Path

import torch

from dafm_ray.config import (
    DatasetConfig,
    EvaluateConfig,
    FinetuneConfig,
    ModelConfig,
    PrecomputeConfig,
    load_config,
)
from dafm_ray.finetune.trainer import finetune, save_weights
from dafm_ray.models.registry import load_model
from dafm_ray.report.evaluate import Evaluation, evaluate
from dafm_ray.tiles.precompute import precompute

WEIGHTS = "package://dafm_ray.demo/weights/clip4cir.safetensors"


def demo_models(weights: str = WEIGHTS) -> tuple[ModelConfig, ...]:
    """The sub-models of the demo."""
    return (
        ModelConfig("clip4cir-sum", f"clip4cir:sum@{weights}"),
        ModelConfig("clip4cir-combiner", f"clip4cir:combiner@{weights}"),
        ModelConfig("image-only", f"zeroshot:image@{weights}"),
        ModelConfig("text-only", f"zeroshot:text@{weights}"),
    )


def run_demo(out: Path, from_scratch: bool, say: Callable[[str], None]) -> Evaluation:
    """Run the demo; a second run finds its tiles.

    Args:
        out: folder of stores and results.
        from_scratch: train the sub-models first instead of using the weights that ship.
        say: receives a line a step.
    """
    weights = str(train_demo_weights(out / "training", say)) if from_scratch else WEIGHTS
    for split in ("val", "test"):
        say(f"icons {split}: features and similarity tiles")
        outcome = precompute(
            PrecomputeConfig(
                dataset=DatasetConfig("icons", split),
                models=demo_models(weights),
                store=str(out / split),
            )
        )
        say(f"  {outcome.blocks} blocks computed, the rest was there")
    say("fusion and evaluation on icons test, convex weights searched on icons val")
    return evaluate(
        EvaluateConfig(store=str(out / "test"), out=str(out / "report"), tune_on=str(out / "val"))
    )


def train_demo_weights(out: Path, say: Callable[[str], None]) -> Path:
    """Train the demo's sub-models on the icons' train split; returns the weights file, fp16."""
    folder = importlib.resources.files("dafm_ray.demo")
    weights = ""
    for stage in ("clip4cir_sum", "clip4cir_combiner"):
        say(f"training {stage}")
        overrides = [f"out={out / stage}"]
        if weights:
            overrides.append(f"model=clip4cir:combiner@{weights}")
        config = load_config(FinetuneConfig, str(folder / f"{stage}.yaml"), overrides)
        weights = str(finetune(config))
    path = out / "clip4cir.safetensors"
    save_weights(load_model(f"clip4cir:combiner@{weights}"), path, torch.float16)
    return path
