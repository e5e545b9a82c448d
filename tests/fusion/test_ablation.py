import numpy as np
import torch

from dafm_ray.fusion.ablation import Without, fused
from dafm_ray.fusion.bank import own_bank
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.inputs import Channels, Inputs
from dafm_ray.fusion.learned import Learned
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.rank import scores_of
from dafm_ray.fusion.static import static_fusion
from tests.samples import labelled_dataset, score_store


def test_the_model_adds_nothing():
    scores_MBN = np.random.default_rng(0).standard_normal((3, 4, 30)).astype(np.float32)
    mean, rows = static_fusion("mean@zscore"), np.arange(4)
    lacking = Without(mean, "b", 1)
    assert lacking.name == "mean@zscore without b"
    before = scores_MBN.copy()
    assert np.array_equal(lacking(scores_MBN, rows), mean(scores_MBN[[0, 2]], rows))
    assert np.array_equal(scores_MBN, before)


def test_what_only_that_model_scored_is_not_ranked():
    scores_MBN = np.ones((2, 1, 3), np.float32)
    scores_MBN[0, 0, 2] = np.nan
    fused_BN = Without(static_fusion("mean@zscore"), "b", 1)(scores_MBN, np.arange(1))
    assert np.isnan(fused_BN).tolist() == [[False, False, True]]


def test_together_they_give_the_bits_that_each_gives_alone(tmp_path):
    """Networks of several folds that know a model less than the store, gaps in the scores, and
    candidates that one model alone scored.
    """
    store = score_store(tmp_path / "s", labelled_dataset(40, 30), ("a", "b", "c", "d"))
    fold_of_Q, known = grouped_folds(store.queries, 3), ("c", "a", "d")
    channels = Channels(known, hubs=True, profiles=True)
    shape = Shape(known, channels.extras, width=8, kernel=3, gate=True)
    networks = {fold: (LightFusion(shape), LightFusion(shape)) for fold in range(3)}
    generator = torch.Generator().manual_seed(0)
    for pair in networks.values():
        for weights in (weights for network in pair for weights in network.parameters()):
            weights.data.add_(torch.randn(weights.shape, generator=generator))
    inputs = Inputs(store, channels, own_bank(store, fold_of_Q, 1.5, profiles=True))
    learned = Learned("learned", networks, inputs, fold_of_Q)
    rows = np.arange(5, 25)
    scores_MBN = scores_of(store, rows)
    scores_MBN[0, :, 3:9] = np.nan
    scores_MBN[2, 4] = np.nan
    for alone in (False, True):
        if alone:
            scores_MBN[1:, 2, 10] = np.nan
        before = scores_MBN.copy()
        systems = [Without(learned, name, m) for m, name in enumerate(store.models)]
        several = [learned, *systems, static_fusion("rrf"), *systems[1:]]
        together = list(fused(several, scores_MBN, rows))
        assert len(together) == len(several)
        for system, found_BN in zip(several, together, strict=True):
            assert np.array_equal(found_BN, system(scores_MBN, rows), equal_nan=True)
        assert np.array_equal(scores_MBN, before, equal_nan=True)
        assert np.isnan(together[1][2, 10]) == alone
        assert not np.isnan(together[2][2, 10])
