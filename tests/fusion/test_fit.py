from dataclasses import replace

import numpy as np
import pytest
import torch

from dafm_ray.config import NegativesConfig, NetworkConfig, Recipe
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.fusion.bank import own_bank
from dafm_ray.fusion.fit import Member, Share, _dropped, fit, members_of
from dafm_ray.fusion.folds import NOBODY, grouped_folds
from dafm_ray.fusion.inputs import Channels, Inputs
from dafm_ray.fusion.learned import Learned
from dafm_ray.fusion.lightfusion import LightFusion, Shape
from dafm_ray.fusion.normalise import zscore
from dafm_ray.fusion.rank import masked_scores, scores_of
from dafm_ray.tiles.manifest import Grid
from tests import samples
from tests.samples import labelled_dataset, score_store

DATASET = labelled_dataset(60, 80)
FOLDS = 4
RECIPE = Recipe(epochs=8, batch=16, learning_rate=3e-2, tau=1.0)
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


def inputs_of(store, bank=True, **channels):
    fold_of = grouped_folds(store.queries, FOLDS)
    own = own_bank(store, fold_of, 1.0, profiles=True) if bank else None
    return Inputs(store, Channels(store.models, hubs=bank, profiles=bank, **channels), own)


def folds_of(inputs):
    return grouped_folds(inputs.store.queries, FOLDS)


def members(inputs, recipe=RECIPE, held_out=range(FOLDS), **network) -> list[Member]:
    given = NetworkConfig(width=8, **network)
    shape = Shape(
        inputs.channels.models,
        inputs.channels.extras,
        given.width,
        given.kernel,
        given.order,
        given.gate,
    )
    return members_of([(LightFusion(shape), fold, 0) for fold in held_out], recipe, recipe.tau)


def fitted(inputs, recipe=RECIPE, share=None, **network):
    found = members(inputs, recipe, **network)
    fit(found, [inputs], [folds_of(inputs)], recipe, share)
    return found


def scores_by(found, inputs):
    networks = {member.held_out: (member.network,) for member in found}
    rows = np.arange(inputs.store.size("queries"))
    learned = Learned("learned", networks, inputs, folds_of(inputs))
    return learned(scores_of(inputs.store, rows), rows)


def out_of_fold(inputs, recipe=RECIPE, **network):
    """(Q, N) scores of every query by the network that did not see its fold."""
    return scores_by(fitted(inputs, recipe, **network), inputs)


def mean_log_rank(store, scores):
    targets = columns_of([query.targets for query in store.queries], store.positions)
    return float(np.log2(rank_targets(scores, targets).stored).mean())


def z_mean(store):
    whole = np.concatenate([chunk.scores_MBN for chunk in masked_scores(store)], axis=1)
    return zscore(whole).mean(axis=0)


def test_before_training_it_is_the_mean_of_z_scores(tmp_path):
    store = opened(tmp_path)
    found = out_of_fold(inputs_of(store), replace(RECIPE, epochs=0))
    np.testing.assert_allclose(found, z_mean(store), atol=1e-6)


def test_it_learns_out_of_fold_which_model_knows(tmp_path):
    store = opened(tmp_path)
    learned = mean_log_rank(store, out_of_fold(inputs_of(store, bank=False)))
    assert learned < mean_log_rank(store, z_mean(store)) - 0.3


@pytest.mark.parametrize("gate", [False, True])
def test_the_order_of_the_models_does_not_matter(tmp_path, gate):
    """A store sorts its models; a network may have them in any order."""
    store = opened(tmp_path)
    one = inputs_of(store)
    two = replace(one, channels=replace(one.channels, models=("weak", "good")))
    assert one.channels.models == ("good", "weak")
    scores = [out_of_fold(inputs, gate=gate) for inputs in (one, two)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)


def test_the_same_seed_gives_the_same_bits_whatever_the_tiles(tmp_path):
    one = opened(tmp_path / "one")
    two = opened(tmp_path / "two", grid=Grid(64, 80, 60))
    scores = [out_of_fold(inputs_of(store)) for store in (one, one, two)]
    assert np.array_equal(scores[0], scores[1], equal_nan=True)
    np.testing.assert_allclose(scores[0], scores[2], atol=1e-3)  # the bank adds up by chunks


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
    learned = [fitted(inputs_of(store)) for store in (one, two)]
    states = [[member.network.state_dict() for member in found] for found in learned]
    for key, value in states[0][2].items():
        assert torch.equal(value, states[1][2][key]), key
    assert not torch.equal(states[0][1]["head"], states[1][1]["head"])


def test_hubs_and_profiles_come_from_neither_the_own_fold_nor_the_one_held_out(tmp_path):
    inputs = inputs_of(opened(tmp_path))
    row = int(np.flatnonzero(folds_of(inputs) == 1)[0])
    given = inputs.read(np.array([row]))
    channels = inputs.complete(given, held_out=3)
    assert channels.shape == (1, 60, 6)
    assert np.array_equal(channels[0, :, 2:4].numpy(), inputs.bank.without(1, 3).T)
    reference = inputs.store.positions[inputs.store.queries[row].reference]
    unit = inputs.bank.profiles.without(1, 3)
    alike = (unit @ unit[:, reference, :, None])[..., 0]
    alike[:, reference] = np.nan  # masked
    expected = np.nan_to_num(zscore(alike.astype(np.float32)))
    np.testing.assert_allclose(channels[0, :, 4:].numpy().T, expected, atol=1e-5)


def test_a_model_that_a_store_lacks_is_a_channel_of_zeros(tmp_path):
    store = opened(tmp_path, ("a", "b", "c"), (1.0, 2.0, 3.0))
    whole, part = inputs_of(store), inputs_of(store.of(("a", "c")))
    part = replace(part, channels=whole.channels)
    rows = np.arange(5)
    full, lacking = whole.complete(whole.read(rows)), part.complete(part.read(rows))
    assert lacking.shape == full.shape
    assert (lacking[..., [1, 4, 7]] == 0).all()
    assert torch.allclose(lacking[..., [0, 2]], full[..., [0, 2]])


def test_a_query_that_one_model_did_not_score_has_no_channel_of_that_model(tmp_path, monkeypatch):
    original = samples.score_matrix

    def partly(*given):
        scores = original(*given)
        scores[3] = np.nan if given[1] == 0 else scores[3]
        return scores

    monkeypatch.setattr(samples, "score_matrix", partly)
    inputs = inputs_of(score_store(tmp_path, DATASET, ("a", "b"), GRID))
    channels = inputs.complete(inputs.read(np.array([2, 3])))
    assert (channels[1, :, [0, 2, 4]] == 0).all()
    assert (channels[0, :, 0] != 0).any()
    assert (channels[1, :, [1, 3]] != 0).any()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_without_one_model_the_others_still_rank(tmp_path, dropout):
    store = opened(tmp_path, ("a", "b", "c"), (2.5, 2.0, 2.0))
    lost = store.of(("b", "c"))
    whole = inputs_of(store)
    networks = fitted(whole, replace(RECIPE, model_dropout=dropout))
    part = replace(inputs_of(lost), channels=whole.channels)
    found = mean_log_rank(store, scores_by(networks, part))
    assert found < mean_log_rank(store, z_mean(store.of(("b",)))) - 0.3
    assert found < mean_log_rank(store, z_mean(lost)) + 0.1


def test_dropout_leaves_every_query_a_model():
    recipe = replace(RECIPE, model_dropout=0.9)
    dropped = _dropped(500, 3, recipe, (0, 0))
    assert 0.5 < dropped.mean() < 0.7
    assert not dropped.all(axis=1).any()
    assert np.array_equal(dropped, _dropped(500, 3, recipe, (0, 0)))
    assert not np.array_equal(dropped, _dropped(500, 3, recipe, (0, 1)))


def test_several_processes_share_a_batch_and_follow_the_same_curve(tmp_path):
    """The shares of two processes, each summed with the other's by hand."""
    inputs = inputs_of(opened(tmp_path))
    alone = fitted(inputs)
    pair = [members(inputs) for _ in range(2)]
    _fit_together(pair, inputs)
    for one, two, other in zip(alone, *pair, strict=True):
        assert one.temperature.trace == two.temperature.trace == other.temperature.trace


def _fit_together(pair, inputs):
    import threading

    barrier, given, sums = threading.Barrier(2), {}, {}

    def share(rank):
        def add_up(flat):
            given[rank] = flat.clone()
            if barrier.wait() == 0:
                sums["all"] = given[0] + given[1]
            barrier.wait()
            flat.copy_(sums["all"])
            barrier.wait()

        return Share(rank, 2, add_up)

    threads = [
        threading.Thread(
            target=fit, args=(pair[rank], [inputs], [folds_of(inputs)], RECIPE, share(rank))
        )
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_a_resumed_fit_ends_as_an_unbroken_one(tmp_path):
    inputs = inputs_of(opened(tmp_path))
    whole, first, second = fitted(inputs), members(inputs), members(inputs)
    fold_of = [folds_of(inputs)]
    fit(first, [inputs], fold_of, replace(RECIPE, epochs=3))
    for member, begun in zip(second, first, strict=True):
        member.restore(begun.state())
    fit(second, [inputs], fold_of, RECIPE, first_epoch=3)
    for one, two in zip(whole, second, strict=True):
        assert one.temperature.trace == two.temperature.trace
        for key, value in one.network.state_dict().items():
            assert torch.equal(value, two.network.state_dict()[key])


def test_paper_temperature_falls_by_its_equation(tmp_path):
    inputs = inputs_of(opened(tmp_path), bank=False)
    recipe = Recipe("info_nce", "paper", tau=1.0, scaling=100.0, epochs=2, batch=40)
    [member] = members(inputs, recipe, held_out=[0])
    fit([member], [inputs], [folds_of(inputs)], recipe)
    tau = 1.0
    for loss, after in member.temperature.trace:
        tau *= 1 - loss / 100.0
        assert after == pytest.approx(tau, rel=1e-12)
    assert len(member.temperature.trace) == 2 * 2
    steep = Recipe("info_nce", "paper", tau=1.0, scaling=1.0)
    with pytest.raises(ConfigError, match="not below the scaling factor"):
        fitted(inputs, steep)


@pytest.mark.parametrize("negatives", [NegativesConfig(60, 0), NegativesConfig(0, 60)])
@pytest.mark.parametrize("objective", ["log_rank", "info_nce"])
def test_all_candidates_as_negatives_are_no_approximation(tmp_path, negatives, objective):
    inputs = inputs_of(opened(tmp_path))
    exact = fitted(inputs, replace(RECIPE, epochs=2, objective=objective))
    sampled = fitted(inputs, replace(RECIPE, epochs=2, objective=objective, negatives=negatives))
    for one, two in zip(exact, sampled, strict=True):
        curves = [np.array(member.temperature.trace) for member in (one, two)]
        np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


def test_few_negatives_still_learn(tmp_path):
    store = opened(tmp_path)
    recipe = replace(RECIPE, negatives=NegativesConfig(10, 10))
    learned = mean_log_rank(store, out_of_fold(inputs_of(store, bank=False), recipe))
    assert learned < mean_log_rank(store, z_mean(store)) - 0.3


def test_a_fit_over_two_stores_learns_from_both(tmp_path):
    one = inputs_of(opened(tmp_path / "one"), bank=False)
    two = inputs_of(opened(tmp_path / "two"), bank=False)
    both = members(one)
    folds = folds_of(one)
    fit(both, [one, two], [folds, folds], RECIPE)
    alone = fitted(one, replace(RECIPE, batch=RECIPE.batch // 2))
    assert len(both[0].temperature.trace) == len(alone[0].temperature.trace)
    assert mean_log_rank(two.store, scores_by(both, two)) < (
        mean_log_rank(two.store, z_mean(two.store)) - 0.3
    )


def test_without_labels_there_is_nothing_to_learn(tmp_path):
    inputs = inputs_of(opened(tmp_path), bank=False)
    with pytest.raises(DataError, match="no query has a target"):
        fit(members(inputs, held_out=[0]), [inputs], [np.zeros(80, dtype=np.int64)], RECIPE)
    assert fit(members(inputs, held_out=[NOBODY]), [inputs], [np.zeros(80, int)], RECIPE) is None
