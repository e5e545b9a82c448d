import pytest
import torch
from safetensors.torch import load_file

from dafm_ray.finetune.losses import in_batch_contrastive


@pytest.mark.parametrize("variant", ["sum", "combiner"])
def test_equals_the_published_loss(golden, variant):
    expected = load_file(golden / "clip4cir" / "outputs.safetensors")
    targets = torch.tensor([1, 2, 3, 0])
    queries, gallery = expected[f"query_{variant}"], expected["index_features"][targets]
    logits = 100 * queries @ gallery.T
    assert torch.allclose(logits, expected[f"train_logits_{variant}"], atol=2e-3)
    loss = in_batch_contrastive(logits, torch.arange(4))
    difference = abs(loss - expected[f"train_loss_{variant}"]).item()
    print(f"golden/clip4cir train_loss_{variant}: difference {difference:.2g}")
    assert difference < 1e-4


def test_the_same_target_twice_is_no_negative():
    scores = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0]])
    targets = torch.tensor([0, 1])
    same = torch.tensor([[True, True, False], [True, True, False]])
    without = in_batch_contrastive(scores[:, [0, 2]], torch.tensor([0, 0]))
    assert in_batch_contrastive(scores, targets, same) == pytest.approx(without.item())
    assert in_batch_contrastive(scores, targets) > without
