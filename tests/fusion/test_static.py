import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafm_ray.config import STATIC_FUSIONS
from dafm_ray.errors import ConfigError
from dafm_ray.fusion.static import Convex, Single, static_fusion

NAN = np.nan
SCORES = np.array(
    [[[0.9, 0.5, 0.1, NAN]], [[10, 30, 20, NAN]]],
    dtype=np.float32,
)

ROWS = np.zeros(1, dtype=np.int64)
"""Static fusions do not read which queries these are."""


def fused(name):
    return static_fusion(name)(SCORES, ROWS)[0]


def test_by_hand():
    assert fused("combsum")[:3] == pytest.approx([1 + 0, 0.5 + 1, 0 + 0.5])
    assert fused("combmnz")[:3] == pytest.approx([2 * 1, 2 * 1.5, 2 * 0.5])
    assert fused("rrf")[:3] == pytest.approx([1 / 61 + 1 / 63, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
    assert fused("borda")[:3] == pytest.approx([1 + 1 / 3, 2 / 3 + 1, 1 / 3 + 2 / 3])
    z = 1 / np.sqrt(2 / 3)
    assert fused("mean")[:3] == pytest.approx([0, z / 2, -z / 2], abs=1e-6)


@pytest.mark.parametrize("name", STATIC_FUSIONS)
def test_a_masked_candidate_stays_masked(name):
    assert np.isnan(fused(name)[3])
    assert np.isfinite(fused(name)[:3]).all()


@pytest.mark.parametrize("name", STATIC_FUSIONS)
@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_permutation_of_models_and_candidates(name, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((3, 2, 9)).astype(np.float32)
    models, candidates = rng.permutation(3), rng.permutation(9)
    system = static_fusion(name)
    straight = system(scores, ROWS)[:, candidates]
    assert system(scores[models][:, :, candidates], ROWS) == pytest.approx(straight, abs=1e-5)


def test_a_model_without_a_score_adds_nothing():
    scores = np.array([[[0.9, 0.1]], [[NAN, 0.7]]], dtype=np.float32)
    assert static_fusion("rrf")(scores, ROWS)[0] == pytest.approx([1 / 61, 1 / 62 + 1 / 61])


def test_combmnz_counts_the_models_that_retrieve():
    scores = np.stack([np.arange(300, 0, -1), np.arange(1, 301)]).astype(np.float32)[:, None, :]
    system = static_fusion("combmnz")(scores, ROWS)[0]
    assert system[0] == pytest.approx(1 * 1)
    middle = static_fusion("combsum")(scores, ROWS)[0][150]
    assert system[150] == pytest.approx(middle)


def test_convex_weighs_z_scores():
    convex = Convex({"a": 1.0, "b": 0.0}, "val")
    assert convex(SCORES, ROWS)[0].argsort().tolist()[:3] == [2, 1, 0]
    assert np.isnan(convex(SCORES, ROWS)[0, 3])


def test_a_single_model_ranks_by_its_own_scores():
    assert Single("b", 1)(SCORES, ROWS) is not None
    assert Single("b", 1)(SCORES, ROWS)[0].tolist()[:3] == [10, 30, 20]


def test_names_are_canonical_and_rules_on_ranks_take_no_normalisation():
    assert static_fusion("mean").name == "mean@zscore"
    assert static_fusion("rrf").name == "rrf"
    for name in ("rrf@zscore", "mean@"):
        with pytest.raises(ConfigError):
            static_fusion(name)


@pytest.mark.parametrize(("name", "near"), [("combsmu", "combsum"), ("mean@zcore", "zscore")])
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        static_fusion(name)


@pytest.mark.parametrize("name", ["rrf", "borda"])
def test_equal_sums_tie_whichever_model_gave_which_rank(name):
    """Ranks (1, 4, 3, 2) and (3, 2, 1, 4) of four models have the same sum of reciprocals."""
    ranks = np.array([[1, 3, 2, 4], [4, 2, 1, 3], [3, 1, 2, 4], [2, 4, 1, 3]], dtype=np.float32)
    fused = static_fusion(name)(-ranks[:, None, :], ROWS)
    assert fused[0, 0] == fused[0, 1]


@given(st.integers(0, 1000), st.integers(3, 60), st.integers(2, 5))
def test_borda_ties_wherever_the_ranks_have_the_same_sum(seed, candidates, models):
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(candidates) + 1 for _ in range(models)])
    fused = static_fusion("borda")(-ranks[:, None, :].astype(np.float32), ROWS)[0]
    sums = ranks.sum(axis=0)
    assert np.array_equal(fused[:, None] == fused[None], sums[:, None] == sums[None])
    assert np.array_equal(fused[:, None] > fused[None], sums[:, None] < sums[None])


@pytest.mark.parametrize("name", STATIC_FUSIONS)
@given(seed=st.integers(0, 1000))
def test_candidates_that_no_list_names_change_nothing(name, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (3, 4, 9)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.5] = NAN
    lists = np.full((3, 4, 40), NAN, dtype=np.float32)
    named = np.sort(rng.permutation(40)[:9])
    lists[:, :, named] = scores
    straight = static_fusion(name)(scores, np.arange(4))
    fused = static_fusion(name)(lists, np.arange(4))
    np.testing.assert_allclose(fused[:, named], straight, atol=1e-6)
    assert np.isnan(np.delete(fused, named, axis=1)).all()
