"""LightFusion (DAFM, eq. 2-5): a few hundred weights turn the scores of several models into one.

    X (K, N) -> LightDW: Y = X + project(act(filter(act(expand(X))))) -> s = head . Y

expand, project and head are 1 x 1 convolutions over the models, the filter is depthwise along the
candidates with width k. At k = 1 the filter and its activation are left out, and the whole
collapses to s = w.x + v.relu(E x + b) per candidate: no candidate sees another, so the order of the
gallery cannot matter. A wider filter needs an order: by mean score (`rank`), which keeps that
property, the annotation file's (`file`), which is the paper's and leaks where files are ordered by
content, or the stored one (`hash`), which is arbitrary.

Shape letters: B queries, N candidates, K channels (models and further statistics), C hidden width.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dafm_ray.config import Order
from dafm_ray.errors import ConfigError

STATISTICS = 4
"""Of a query's scores under one model, seen by the gate; see `query_statistics`."""

PIECE = 4096
"""Candidates of a query that are fused at a time."""


@dataclass(frozen=True)
class Shape:
    """What a network is built from.

    Attributes:
        models: names of the models whose scores come in, one channel each.
        extras: names of further channels a candidate has, as `hub:MODEL`.
        width: C.
        kernel: k, odd.
        order: of the candidates under a filter; without one it is not read.
        gate: mix the models by the statistics of a query's scores.
        seed: of the expansion; a model's weights depend on its name, not on its place.
    """

    models: tuple[str, ...]
    extras: tuple[str, ...] = ()
    width: int = 32
    kernel: int = 1
    order: Order = "rank"
    gate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        names = [*self.models, *self.extras]
        if not self.models or len(set(names)) < len(names):
            raise ConfigError("fusion: name at least one model, and each channel once")
        if self.width < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError("fusion: width must be at least 1, kernel odd and at least 1")

    @property
    def channels(self) -> tuple[str, ...]:
        """All K names."""
        return (*self.models, *self.extras)


class LightFusion(nn.Module):
    """The network; before training it equals a weighted sum of its channels exactly.

    Args:
        shape: what it is built from.
        start: weight of each channel at the start, as convex weights searched before; by default
            1 / models for scores and 0 for extras, which is mean fusion.
    """

    def __init__(self, shape: Shape, start: Sequence[float] | None = None) -> None:
        super().__init__()
        self.shape = shape
        channels, width = len(shape.channels), shape.width
        even = [1 / len(shape.models)] * len(shape.models) + [0.0] * len(shape.extras)
        self.head = nn.Parameter(torch.tensor(start or even, dtype=torch.float32))
        if self.head.shape != (channels,):
            raise ConfigError(f"fusion: {channels} channels need as many starting weights")
        columns = [_seeded(shape.seed, name, width) for name in shape.channels]
        self.expand = nn.Parameter(torch.stack(columns, dim=1) / channels**0.5)
        self.bias = nn.Parameter(_seeded(shape.seed, "bias", width))
        self.project = nn.Parameter(torch.zeros(channels, width))
        self.filter = nn.Parameter(_filter(shape)) if shape.kernel > 1 else None
        self.gate = Gate() if shape.gate else None

    def forward(
        self,
        inputs_BNK: Tensor,
        absent_BN: Tensor | None = None,
        source_order_N: Tensor | None = None,
    ) -> Tensor:
        """Fuse.

        Args:
            inputs_BNK: normalised scores and extras, in the order of `shape.channels`; 0 where a
                model is missing.
            absent_BN: bool, candidates that are masked or that no model scored; what stands for
                them in `inputs_BNK` is not read, 0 takes its place.
            source_order_N: position of each candidate in the annotation file, for `order: file`.

        Returns:
            (B, N) scores; -inf for absent candidates.
        """
        if absent_BN is not None:
            inputs_BNK = inputs_BNK.masked_fill(absent_BN[..., None], 0.0)
        if self.gate is not None:
            models = len(self.shape.models)
            scores_BNM = inputs_BNK[..., :models]
            gated_BNM = scores_BNM * self.gate(scores_BNM)[:, None]
            inputs_BNK = torch.cat([gated_BNM, inputs_BNK[..., models:]], dim=-1)
        if self.filter is None:
            out_C = self.head @ self.project
            # The hidden layer of a piece is memory that the next one takes again.
            whole = torch.is_grad_enabled() or inputs_BNK.is_cuda
            pieces = [inputs_BNK] if whole else torch.split(inputs_BNK, PIECE, dim=1)
            fused_BN = torch.cat([self._collapsed(piece, out_C) for piece in pieces], dim=1)
        else:
            order_BN = self._order(inputs_BNK, source_order_N)
            sorted_BNK = inputs_BNK.gather(1, order_BN[..., None].expand_as(inputs_BNK))
            sorted_BN = self._filtered(sorted_BNK, self.filter)
            fused_BN = torch.zeros_like(sorted_BN).scatter(1, order_BN, sorted_BN)
        return fused_BN if absent_BN is None else fused_BN.masked_fill(absent_BN, -torch.inf)

    def _collapsed(self, inputs_BNK: Tensor, out_C: Tensor) -> Tensor:
        """Block and head without a filter, projection and head in one."""
        hidden_BNC = nn.functional.linear(inputs_BNK, self.expand, self.bias).relu_()
        return inputs_BNK @ self.head + hidden_BNC @ out_C

    def _filtered(self, inputs_BNK: Tensor, filter_CK: Tensor) -> Tensor:
        """Block and head with the filter along the candidates as they stand."""
        out_C = self.head @ self.project
        weights = (self.expand, self.bias, filter_CK, out_C)
        # With a gate the inputs learn too, which the quick backward pass leaves out.
        quick = torch.is_grad_enabled() and not inputs_BNK.requires_grad
        block_BN = (
            _Filtered.apply(inputs_BNK, *weights)  # type: ignore[no-untyped-call]
            if quick
            else _filtered(inputs_BNK, *weights)[0]
        )
        fused_BN: Tensor = inputs_BNK @ self.head + block_BN
        return fused_BN

    def _order(self, inputs_BNK: Tensor, source_order_N: Tensor | None) -> Tensor:
        """(B, N) candidates in the order that the filter runs along."""
        shape = inputs_BNK.shape[:2]
        if self.shape.order == "hash":
            return torch.arange(shape[1], device=inputs_BNK.device).expand(shape)
        if self.shape.order == "file":
            if source_order_N is None:
                raise ConfigError("fusion: order `file` needs the gallery's source order")
            return source_order_N.argsort().expand(shape)
        mean_BN = inputs_BNK.detach()[..., : len(self.shape.models)].mean(-1)
        return mean_BN.argsort(dim=1, descending=True, stable=True)


def _filtered(
    inputs_BNK: Tensor, expand_CK: Tensor, bias_C: Tensor, filter_CF: Tensor, out_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """out . act(filter(act(expand))), and what the two activations gave."""
    count = len(inputs_BNK)
    hidden_BCN = torch.baddbmm(
        bias_C[None, :, None], expand_CK.expand(count, -1, -1), inputs_BNK.transpose(1, 2)
    ).relu_()
    mixed_BCN = _along(hidden_BCN, filter_CF).relu_()
    return out_C @ mixed_BCN, hidden_BCN, mixed_BCN


def _along(values_BCN: Tensor, filter_CF: Tensor) -> Tensor:
    """A depthwise convolution as a sum of shifts, a fifth of the time of torch's on a CPU."""
    count, kernel = values_BCN.shape[-1], filter_CF.shape[1]
    padded_BCN = nn.functional.pad(values_BCN, (kernel // 2, kernel // 2))
    sum_BCN = padded_BCN[..., :count] * filter_CF[:, :1]
    for f in range(1, kernel):
        sum_BCN.addcmul_(padded_BCN[..., f : f + count], filter_CF[:, f : f + 1])
    return sum_BCN


class _Filtered(torch.autograd.Function):
    """`_filtered` with a backward pass of its own, which leaves the inputs out."""

    @staticmethod
    def forward(ctx: Any, inputs_BNK: Tensor, *weights: Tensor) -> Tensor:
        block_BN, hidden_BCN, mixed_BCN = _filtered(inputs_BNK, *weights)
        ctx.save_for_backward(inputs_BNK, hidden_BCN, mixed_BCN, *weights)
        return block_BN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad_BN] = grads
        inputs_BNK, hidden_BCN, mixed_BCN, _, _, filter_CF, out_C = ctx.saved_tensors
        count, kernel = inputs_BNK.shape[1], filter_CF.shape[1]
        out_grad_C = torch.bmm(mixed_BCN, grad_BN[..., None]).sum(0)[:, 0]
        mixed_grad_BCN = _through_relu(out_C[:, None] * grad_BN[:, None], mixed_BCN)
        padded_BCN = nn.functional.pad(hidden_BCN, (kernel // 2, kernel // 2))
        shifted = [padded_BCN[..., f : f + count] for f in range(kernel)]
        filter_grads = [torch.linalg.vecdot(mixed_grad_BCN, one).sum(0) for one in shifted]
        hidden_grad_BCN = _through_relu(_along(mixed_grad_BCN, filter_CF.flip(1)), hidden_BCN)
        expand_grad_CK = torch.bmm(hidden_grad_BCN, inputs_BNK).sum(0)
        bias_grad_C = hidden_grad_BCN.sum((0, 2))
        return None, expand_grad_CK, bias_grad_C, torch.stack(filter_grads, 1), out_grad_C


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.threshold_backward(grad, output, 0)
    return found


def grown(smaller: LightFusion, shape: Shape) -> LightFusion:
    """A network with more channels that, before it is trained on, fuses as a smaller one does.

    Args:
        smaller: its channels are some of those of `shape`, its width and kernel the same.
        shape: of the new one.
    """
    network = LightFusion(shape, [0.0] * len(shape.channels))
    places = [shape.channels.index(name) for name in smaller.shape.channels]
    added = [k for k in range(len(shape.channels)) if k not in places]
    state = smaller.state_dict()
    with torch.no_grad():
        network.expand[:, added] = 0
        network.head[places] = state.pop("head")
        network.expand[:, places] = state.pop("expand")
        network.project[places] = state.pop("project")
    network.load_state_dict(state, strict=False)
    return network


class Gate(nn.Module):
    """A factor a model and query, from statistics of the query's scores; 1 before training.

    One small network serves every model, so any number of them may come in any order.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * STATISTICS, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            count = self.hidden.weight.numel()
            self.hidden.weight.copy_(_seeded(0, "gate", count).view_as(self.hidden.weight) / 4)
            self.hidden.bias.zero_()

    def forward(self, scores_BNM: Tensor) -> Tensor:
        """(B, N, M) z-scores -> (B, M) factors above 0."""
        own_BMS = query_statistics(scores_BNM)
        all_BMS = own_BMS.mean(1, keepdim=True).expand_as(own_BMS)
        hidden_BMW = torch.relu(self.hidden(torch.cat([own_BMS, all_BMS], dim=-1)))
        factors_BM: Tensor = torch.exp(torch.tanh(self.out(hidden_BMW)[..., 0]))
        return factors_BM


def query_statistics(scores_BNM: Tensor) -> Tensor:
    """(B, N, M) z-scores -> (B, M, 4): best score, its lead over the second, how even the softmax
    of the scores is (0 to 1), and the mean correlation with the other models.
    """
    count, models = scores_BNM.shape[1:]
    best_B2M = scores_BNM.topk(min(2, count), dim=1).values
    lead_BM = best_B2M[:, 0] - best_B2M[:, -1]
    log_BNM = torch.log_softmax(scores_BNM, dim=1)
    entropy_BM = -(log_BNM.exp() * log_BNM).sum(1) / math.log(max(count, 2))
    covariance_BMM = scores_BNM.transpose(1, 2) @ scores_BNM / count
    variance_BM = covariance_BMM.diagonal(dim1=1, dim2=2)
    agreement_BM = (covariance_BMM.sum(-1) - variance_BM) / max(models - 1, 1)
    return torch.stack([best_B2M[:, 0], lead_BM, entropy_BM, agreement_BM], dim=-1)


def _seeded(seed: int, name: str, size: int) -> Tensor:
    """(size,) normal values that depend on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(size, generator=generator)


def _filter(shape: Shape) -> Tensor:
    """(C, k), close to leaving everything as it is."""
    weights_CK = _seeded(shape.seed, "filter", shape.width * shape.kernel)
    weights_CK = 0.1 * weights_CK.view(shape.width, shape.kernel)
    weights_CK[:, shape.kernel // 2] += 1
    return weights_CK
