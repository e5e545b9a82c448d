import numpy as np

from dafm_ray.fusion.ablation import Without
from dafm_ray.fusion.static import static_fusion


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
