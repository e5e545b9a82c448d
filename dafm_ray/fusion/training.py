"""Fitting LightFusion on all folds of a store's queries but one, and ranking that one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from dafm_ray.errors import ConfigError, DataError, unknown
from dafm_ray.evaluation.metrics import Ints, Scores
from dafm_ray.fusion.inputs import Inputs
from dafm_ray.fusion.lightfusion import LightFusion
from dafm_ray.fusion.objective import OBJECTIVES
from dafm_ray.fusion.temperature import Mode, Temperature


@dataclass(frozen=True)
class Recipe:
    """How a fusion is fitted.

    Attributes:
        objective: `log_rank` or `info_nce`.
        temperature: mode of tau.
        tau: where tau starts, in units of the z-scores.
        scaling: S of DAFM's eq. 7.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        epochs: passes over the queries.
        batch: queries of a step.
        seed: of the order of the queries.
    """

    objective: str = "log_rank"
    temperature: Mode = "fixed"
    tau: float = 1.0
    scaling: float = 500.0
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    epochs: int = 4
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(unknown("objective", self.objective, OBJECTIVES))
        if self.temperature not in get_args(Mode):
            raise ConfigError(unknown("temperature mode", self.temperature, get_args(Mode)))
        if min(self.learning_rate, self.tau, self.scaling) <= 0 or self.weight_decay < 0:
            raise ConfigError("fusion: learning_rate, tau and scaling must be above 0")
        if self.epochs < 0 or self.batch < 1:
            raise ConfigError("fusion: epochs must be at least 0, batch at least 1")


def fit(network: LightFusion, inputs: Inputs, held_out: int, recipe: Recipe) -> Temperature:
    """Fit on the labelled queries of every fold but one.

    Args:
        network: its channels are those of `inputs`; changed in place.
        inputs: of one store.
        held_out: the fold that is left out.
        recipe: how.

    Returns:
        tau at the end, with the loss and tau of every step.

    Raises:
        ConfigError: tau cannot go on, see `Temperature`.
        DataError: no query to learn from.
    """
    labelled = np.array([bool(query.targets) for query in inputs.store.queries])
    rows = np.flatnonzero(labelled & (inputs.fold_of_Q != held_out))
    if not len(rows):
        raise DataError(f"{inputs.store.uri}: no query has a target, so no fusion can be learnt")
    temperature = Temperature(recipe.temperature, recipe.tau, recipe.scaling)
    objective = OBJECTIVES[recipe.objective]
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    for epoch in range(recipe.epochs):
        for batch in _batches(rows, recipe, epoch):
            given = inputs(batch, held_out)
            fused_BN = network(given.inputs_BNK, given.absent_BN)
            loss = objective(fused_BN, given.targets_BT, temperature.value).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            temperature.update(loss.item())
    return temperature


def _batches(rows: Ints, recipe: Recipe, epoch: int) -> Iterator[Ints]:
    """All rows once, shuffled."""
    shuffled = np.random.default_rng([recipe.seed, epoch]).permutation(rows)
    for start in range(0, len(shuffled), recipe.batch):
        yield shuffled[start : start + recipe.batch]


def fused(network: LightFusion, inputs: Inputs, rows_B: Ints, held_out: int) -> Scores:
    """(B, N) fused scores of queries of the fold that was held out; NaN for absent candidates."""
    with torch.inference_mode():
        given = inputs(rows_B, held_out)
        scores_BN: Scores = network(given.inputs_BNK, given.absent_BN).numpy()
    scores_BN[given.absent_BN.numpy()] = np.nan
    return scores_BN
