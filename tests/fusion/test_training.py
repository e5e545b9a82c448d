import numpy as np
import pytest
import torch

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.fusion.bank import collect
from dafm_ray.fusion.folds import grouped_folds
from dafm_ray.fusion.inputs import Inputs
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores
from dafm_ray.fusion.training import Recipe, fit, fused
from dafm_ray.tiles.manifest import Grid
from tests import samples
from tests.samples import labelled_dataset, score_store

DATASET = labelled_dataset(60, 80)
FOLDS = 4
RECIPE = Recipe(epochs=8, batch=16, learning_rate=3e-2)


GRID = Grid(16, 32, 40)


def opened(root, models=("weak", "good"), signals=(0.0, 2.5), grid=GRID):
    """Scores of a model are noise plus its signal, whatever its place."""
    matrices = {
        name: samples.score_matrix(DATASET, sum(map(ord, name)), signal)
        for name, signal in zip(models, signals, strict=True)
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(samples, "score_matrix", lambda _, m, __: matrices[models[m]])
        return score_store(root, DATASET, models, grid)


def inputs_of(store, bank=True):
    fold_of = grouped_folds(store.queries, FOLDS)
    return Inputs(store, fold_of, collect(store, fold_of) if bank else None)


def network_of(inputs, **shape):
    return LightFusion(Shape(inputs.store.models, inputs.extras, width=8, **shape))


def out_of_fold(inputs, recipe=RECIPE, **shape):
    """(Q, N) scores of every query by the network that did not see its fold."""
    size = (inputs.store.size("queries"), inputs.store.size("gallery"))
    scores = np.full(size, np.nan, np.float32)
    for fold in range(FOLDS):
        network = network_of(inputs, **shape)
        fit(network, inputs, fold, recipe)
        rows = np.flatnonzero(inputs.fold_of_Q == fold)
        scores[rows] = fused(network, inputs, rows, fold)
    return scores


def mean_log_rank(store, scores):
    targets = columns_of([query.targets for query in store.queries], store.positions)
    return float(np.log2(rank_targets(scores, targets).stored).mean())


def z_mean(store):
    whole = np.concatenate([chunk.scores_MBN for chunk in masked_scores(store)], axis=1)
    return zscore(whole).mean(axis=0)


def test_before_training_it_is_the_mean_of_z_scores(tmp_path):
    store = opened(tmp_path)
    found = out_of_fold(inputs_of(store), Recipe(epochs=0))
    np.testing.assert_allclose(found, z_mean(store), atol=1e-6)


def test_it_learns_out_of_fold_which_model_knows(tmp_path):
    store = opened(tmp_path)
    learned = mean_log_rank(store, out_of_fold(inputs_of(store, bank=False)))
    assert learned < mean_log_rank(store, z_mean(store)) - 0.3


@pytest.mark.parametrize("gate", [False, True])
def test_the_order_of_the_models_does_not_matter(tmp_path, gate):
    one = opened(tmp_path / "one")
    two = opened(tmp_path / "two", models=("good", "weak"), signals=(2.5, 0.0))
    scores = [out_of_fold(inputs_of(store), gate=gate) for store in (one, two)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)


def test_the_same_seed_gives_the_same_bits_whatever_the_tiles(tmp_path):
    one = opened(tmp_path / "one")
    two = opened(tmp_path / "two", grid=Grid(64, 80, 60))
    scores = [out_of_fold(inputs_of(store)) for store in (one, one, two)]
    assert np.array_equal(scores[0], scores[1], equal_nan=True)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-5)  # the bank adds up by chunks


def test_the_fold_held_out_leaves_no_trace_in_what_is_learned(tmp_path, monkeypatch):
    fold_of = grouped_folds(DATASET.queries, FOLDS)
    one = opened(tmp_path / "one")
    original = samples.score_matrix

    def other_scores(*given):
        scores = original(*given)
        scores[fold_of == 2] = original(DATASET, 99, 9.0)[fold_of == 2]
        return scores

    monkeypatch.setattr(samples, "score_matrix", other_scores)
    two = opened(tmp_path / "two")
    learned = []
    for store in (one, two):
        inputs = inputs_of(store)
        network = network_of(inputs)
        fit(network, inputs, 2, RECIPE)
        learned.append(network.state_dict())
    for key, value in learned[0].items():
        assert torch.equal(value, learned[1][key]), key


def test_hub_statistics_come_from_neither_the_own_fold_nor_the_one_held_out(tmp_path):
    inputs = inputs_of(opened(tmp_path))
    row = int(np.flatnonzero(inputs.fold_of_Q == 1)[0])
    given = inputs(np.array([row]), held_out=3)
    assert given.inputs_BNK.shape == (1, 60, 4)
    expected = inputs.bank.without(1, 3).T
    assert np.array_equal(given.inputs_BNK[0, :, 2:].numpy(), expected)


def test_paper_temperature_falls_by_its_equation(tmp_path):
    inputs = inputs_of(opened(tmp_path), bank=False)
    recipe = Recipe("info_nce", "paper", tau=1.0, scaling=100.0, epochs=2, batch=30)
    trace = fit(network_of(inputs), inputs, 0, recipe).trace
    tau = 1.0
    for loss, after in trace:
        tau *= 1 - loss / 100.0
        assert after == pytest.approx(tau, rel=1e-12)
    assert len(trace) == 2 * 2
    steep = Recipe("info_nce", "paper", scaling=1.0)
    with pytest.raises(ConfigError, match="not below the scaling factor"):
        fit(network_of(inputs), inputs, 0, steep)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "mse"}, "objective"),
        ({"temperature": "hot"}, "temperature mode"),
        ({"tau": 0.0}, "above 0"),
        ({"batch": 0}, "batch at least 1"),
    ],
)
def test_a_wrong_recipe_is_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(**wrong)


def test_without_labels_there_is_nothing_to_learn(tmp_path):
    inputs = inputs_of(opened(tmp_path))
    everything = Inputs(inputs.store, np.zeros_like(inputs.fold_of_Q), None)
    with pytest.raises(DataError, match="no query has a target"):
        fit(network_of(everything), everything, 0, RECIPE)
