"""Fitting the networks of all folds at once, by one process or by several that share each batch.

A query is read once a pass, for all networks that may learn from it. Its loss needs no other query,
so a batch is worked off in pieces that fit a CPU's cache, and gradients add up exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dafm_ray.config import Recipe
from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Floats, Ints
from dafm_ray.fusion.inputs import Given, Inputs, labelled_rows
from dafm_ray.fusion.lightfusion import LightFusion
from dafm_ray.fusion.negatives import sampled
from dafm_ray.fusion.objective import OBJECTIVES
from dafm_ray.fusion.temperature import Temperature

CACHED_CANDIDATES = 16_384
"""Candidates of one forward and backward pass: what their hidden layer takes stays in the cache."""

PARTS = 8
"""A batch is worked off in so many parts, whatever the number of processes."""

State = dict[str, Any]
Reduce = Callable[[Tensor], None]


@dataclass
class Member:
    """One network of a fit.

    Attributes:
        network: changed in place.
        held_out: the fold it never sees; `NOBODY` learns from all queries.
        seed: of its expansion.
        temperature: its own tau.
    """

    network: LightFusion
    held_out: int
    seed: int
    recipe: Recipe
    temperature: Temperature

    @cached_property
    def optimiser(self) -> torch.optim.Optimizer:
        """Over the weights; made when asked for, as torch imports a compiler with it."""
        return torch.optim.AdamW(
            self.network.parameters(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """In a fixed order."""
        return list(self.network.parameters())

    def state(self) -> State:
        """What a resumed fit needs."""
        return {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "temperature": self.temperature.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.finish(state)
        self.optimiser.load_state_dict(state["optimiser"])

    def finish(self, state: Mapping[str, Any]) -> None:
        """What a fit has found, for a network that learns no more."""
        self.network.load_state_dict(state["network"])
        self.temperature.restore(state["temperature"])


def members_of(
    networks: Sequence[tuple[LightFusion, int, int]], recipe: Recipe, tau: float
) -> list[Member]:
    """Networks ready to be fitted.

    Args:
        networks: each with the fold it holds out and its seed.
        recipe: how.
        tau: where tau starts, in units of the normalised scores.
    """
    return [
        Member(network, held_out, seed, recipe, Temperature.of(recipe, tau))
        for network, held_out, seed in networks
    ]


@dataclass(frozen=True)
class Share:
    """Which part of each batch a process works off.

    Attributes:
        rank: of this process.
        processes: how many there are.
        add_up: sums a tensor over all processes, in place.
        device: of the networks.
    """

    rank: int = 0
    processes: int = 1
    add_up: Reduce = lambda tensor: None
    device: str = "cpu"


def fit(
    members: Sequence[Member],
    inputs: Sequence[Inputs],
    fold_of_Qs: Sequence[Ints],
    recipe: Recipe,
    share: Share | None = None,
    after_epoch: Callable[[int], None] = lambda epoch: None,
    first_epoch: int = 0,
) -> None:
    """Fit every network on the labelled queries of all folds but the one it holds out.

    Args:
        members: changed in place.
        inputs: of each store; their channels are those of the networks.
        fold_of_Qs: fold of each query, store by store.
        recipe: how.
        share: of a process among several; alone by default.
        after_epoch: receives the number of epochs done.
        first_epoch: epochs an earlier run has done.

    Raises:
        ConfigError: tau cannot go on, see `Temperature`.
        DataError: no query to learn from.
    """
    share = share or Share()
    rows = labelled_rows([one.store for one in inputs])
    folds = np.array([fold_of_Qs[s][q] for s, q in rows], dtype=np.int64)
    for member in members:
        if not (folds != member.held_out).any():
            uris = ", ".join(one.store.uri for one in inputs)
            raise DataError(f"{uris}: no query has a target, so no fusion can be learnt")
    for epoch in range(first_epoch, recipe.epochs):
        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(rows))
        for start in range(0, len(order), recipe.batch):
            chosen = np.sort(order[start : start + recipe.batch])
            _step(members, inputs, rows[chosen], folds[chosen], recipe, share, (epoch, start))
        for member in members:
            member.temperature.end_epoch()
        after_epoch(epoch + 1)


def _step(
    members: Sequence[Member],
    inputs: Sequence[Inputs],
    rows_B2: Ints,
    fold_of_B: Ints,
    recipe: Recipe,
    share: Share,
    place: tuple[int, int],
) -> None:
    """One optimiser step of every network."""
    counts = [int((fold_of_B != member.held_out).sum()) for member in members]
    models = len(inputs[0].channels.models)
    dropped_BM = _dropped(len(rows_B2), models, recipe, place)
    sums = _Sums(members, share)
    for part in range(share.rank, PARTS, share.processes):
        mine = np.arange(len(rows_B2))[part::PARTS]
        losses = np.zeros(len(members))
        for s, one in enumerate(inputs):
            here = mine[rows_B2[mine, 0] == s]
            done = 0
            for given in one.parts(rows_B2[here, 1]):
                read = here[done : done + len(given.rows_B)]
                done += len(read)
                given = given._replace(
                    present_BM=given.present_BM & ~torch.from_numpy(dropped_BM[read])
                )
                for m, (member, count) in enumerate(zip(members, counts, strict=True)):
                    learning = np.flatnonzero(fold_of_B[read] != member.held_out)
                    for loss in _losses(member, one, given, learning, share.device, place):
                        (loss / count).backward()  # type: ignore[no-untyped-call]
                        losses[m] += loss.item()
        sums.keep(part, losses)
    for member, loss_sum, count in zip(members, sums.add_up(), counts, strict=True):
        if count:
            member.optimiser.step()
            member.temperature.update(loss_sum / count)


def _losses(
    member: Member,
    inputs: Inputs,
    given: Given,
    learning: Ints,
    device: str,
    place: tuple[int, int],
) -> Iterator[Tensor]:
    """Summed losses of some queries, piece by piece."""
    if not len(learning):
        return
    given = given.select(learning)
    objective = OBJECTIVES[member.recipe.objective]
    channels_BNK = inputs.complete(given, member.held_out)
    targets_BT, unseen_BN = inputs.targets(given.rows_B), given.unseen_BN
    absent_BN = given.absent_BN
    negatives = member.recipe.negatives
    if negatives.top or negatives.random:
        seed = (member.recipe.seed, *place)
        columns_BS, absent_BN, targets_BT = sampled(given, targets_BT, negatives, seed)
        unseen_BN = absent_BN
        index_BSK = columns_BS[..., None].expand(-1, -1, channels_BNK.shape[-1])
        channels_BNK = channels_BNK.gather(1, index_BSK)
    source_order_N = inputs.source_order.to(device)
    step = max(1, CACHED_CANDIDATES // channels_BNK.shape[1])
    for start in range(0, len(channels_BNK), step):
        piece = slice(start, start + step)
        fused_BN = member.network(
            channels_BNK[piece].to(device), unseen_BN[piece].to(device), source_order_N
        )
        if inputs.sees_reference:
            fused_BN = fused_BN.masked_fill(absent_BN[piece].to(device), -torch.inf)
        yield objective(fused_BN, targets_BT[piece].to(device), member.temperature.value).sum()


def _dropped(queries: int, models: int, recipe: Recipe, place: tuple[int, int]) -> np.ndarray:
    """(B, M) bool: models a query has to do without, never all of them."""
    if not recipe.model_dropout or models == 1:
        return np.zeros((queries, models), dtype=bool)
    rng = np.random.default_rng([recipe.seed, *place, 1])
    dropped_BM = rng.random((queries, models)) < recipe.model_dropout
    dropped_BM[np.arange(queries), rng.integers(models, size=queries)] = False
    return dropped_BM


class _Sums:
    """Gradients and losses of a batch, part by part.

    A part is worked off by one process, and parts are added in their order, so the sum has the same
    bits whoever did which: Adam makes a difference of 1e-7 into one of 1e-2 within twenty steps.
    """

    def __init__(self, members: Sequence[Member], share: Share) -> None:
        self._members = len(members)
        self._weights = [weight for member in members for weight in member.parameters]
        self._share = share
        size = self._members + sum(weight.numel() for weight in self._weights)
        self._parts = torch.zeros(PARTS, size, dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        for weight in self._weights:
            weight.grad = None

    def keep(self, part: int, losses: Floats) -> None:
        """Take the gradients that stand in the weights, and the losses, as those of a part."""
        flat = [torch.from_numpy(losses)]
        for weight in self._weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            flat.append(gradient.detach().double().flatten().cpu())
        self._parts[part] = torch.cat(flat)
        self._clear()

    def add_up(self) -> list[float]:
        """Put the gradients of all parts into the weights; returns the loss of each network."""
        if self._share.processes > 1:
            self._share.add_up(self._parts)
        total = torch.zeros_like(self._parts[0])
        for part in self._parts:
            total += part
        place = self._members
        for weight in self._weights:
            values = total[place : place + weight.numel()].view_as(weight)
            weight.grad = values.to(weight.dtype).to(weight.device)
            place += weight.numel()
        losses: list[float] = total[: self._members].tolist()
        return losses
