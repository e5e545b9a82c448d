import pytest
import torch

from dafm_ray.finetune.losses import in_batch_contrastive


def test_the_same_target_twice_is_no_negative():
    scores = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    targets = torch.tensor([0, 1])
    same = torch.tensor([[True, True, False], [True, True, False]])
    without = in_batch_contrastive(scores[:, [0, 2]], torch.tensor([0, 0]))
    assert in_batch_contrastive(scores, targets, same) == pytest.approx(without.item())
    assert in_batch_contrastive(scores, targets) > without
