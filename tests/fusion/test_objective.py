import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.fusion.objective import info_nce, log_rank, streamed_logsumexp

SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, -torch.inf]])


def test_info_nce_is_cross_entropy_over_the_whole_gallery():
    targets = torch.tensor([[1], [0]])
    expected = torch.nn.functional.cross_entropy(SCORES / 0.5, targets[:, 0], reduction="none")
    assert torch.allclose(info_nce(SCORES, targets, 0.5), expected, atol=1e-6)


def test_each_of_several_targets_meets_only_what_is_no_target():
    [loss, _] = info_nce(SCORES, torch.tensor([[0, 1], [2, -1]]), 1.0).tolist()
    others = math.exp(0) + math.exp(-1)
    by_hand = [math.log(1 + others / math.exp(score)) for score in (2.0, 1.0)]
    assert loss == pytest.approx(sum(by_hand) / 2, abs=1e-6)


def test_log_rank_is_the_log_of_the_rank_at_low_temperature():
    found = log_rank(SCORES, torch.tensor([[2], [2]]), 1e-3)
    assert torch.allclose(found, torch.tensor([math.log(3.0), 0.0]), atol=1e-5)


@pytest.mark.parametrize("objective", [info_nce, log_rank])
def test_masked_candidates_and_missing_targets_give_no_gradient_and_no_nan(objective):
    scores = SCORES.clone().requires_grad_()
    losses = objective(scores, torch.tensor([[1, -1], [-1, -1]]), 0.1)
    assert losses[1] == 0
    losses.sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[1].abs().max() == 0
    masked_target = objective(SCORES, torch.tensor([[1], [3]]), 0.1)
    assert masked_target[1] == 0


@pytest.mark.parametrize("objective", [info_nce, log_rank])
@pytest.mark.parametrize("target", [1, 0])
def test_a_masked_first_candidate_gives_no_nan_to_queries_with_fewer_targets(objective, target):
    scores = SCORES.flip(1).clone().requires_grad_()
    losses = objective(scores, torch.tensor([[1, 2], [target, -1]]), 0.1)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("objective", [info_nce, log_rank])
def test_scores_that_are_no_numbers_are_no_small_loss(objective):
    assert objective(torch.full((1, 3), torch.nan), torch.tensor([[0]]), 0.1).isnan().all()


@pytest.mark.parametrize("objective", [info_nce, log_rank])
def test_a_higher_target_costs_less(objective):
    losses = []
    for target in range(4):
        losses.append(float(objective(SCORES[:1], torch.tensor([[target]]), 0.3)))
    assert losses == sorted(losses)


@given(st.integers(1, 40), st.integers(1, 7), st.floats(0.01, 100))
def test_streaming_over_tiles_is_exact(candidates, width, scale):
    generator = torch.Generator().manual_seed(candidates)
    scores = scale * torch.randn(3, candidates, generator=generator, dtype=torch.float64)
    whole = torch.logsumexp(scores, dim=1)
    streamed = streamed_logsumexp(torch.split(scores, width, dim=1))
    assert torch.allclose(streamed, whole, rtol=1e-12)
