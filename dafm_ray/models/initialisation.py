"""Random weights: from a seed, and of a spread that suits the width."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch

Built = TypeVar("Built")


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """Build something random from a seed, leaving torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch GPUs too
        return build()


def spread(width: int) -> float:
    """Standard deviation of new weights of a transformer: BERT's 0.02 at BERT's width of 768.

    A narrower one takes more, so that a layer's output keeps its size. transformers' own 1e-10 for
    vision towers leaves a new tower constant.
    """
    return 0.02 * math.sqrt(768 / width)
