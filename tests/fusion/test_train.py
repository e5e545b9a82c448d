import csv
import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from dafm_ray.cli import main
from dafm_ray.config import FusionConfig, NetworkConfig, Recipe
from dafm_ray.errors import ConfigError, DataError, MachineError
from dafm_ray.fusion.artefact import load_artefact
from dafm_ray.fusion.bank import banked_convex
from dafm_ray.fusion.fit import fit
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.lightfusion import LightFusion
from dafm_ray.fusion.rank import masked_scores, scores_of
from dafm_ray.fusion.static import Convex
from dafm_ray.fusion.train import build, folds_of, open_inputs, open_stores, prepare, train_fusion
from dafm_ray.job import train_fusion_job
from dafm_ray.lease import writing
from dafm_ray.storage import open_storage
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, score_store

MODELS = ("a", "b", "c")
GRID = Grid(64, 100, 80)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    val = score_store(root / "val", labelled_dataset(150, 300), MODELS, GRID, signal=2.0)
    test = labelled_dataset(120, 60, seed=7, split="test")
    return val, score_store(root / "test", test, MODELS, GRID, seed=7, signal=2.0)


@pytest.fixture(scope="module")
def config(stores, tmp_path_factory):
    return FusionConfig(
        store=stores[0].uri,
        out=str(tmp_path_factory.mktemp("fusion") / "out"),
        folds=3,
        network=NetworkConfig(width=8),
        recipe=Recipe(epochs=12, batch=16, model_dropout=0.2),
        workers=2,
        cases=2,
    )


def in_this_process(config):
    """The same training by one process, without Ray."""
    stores = open_stores(config)
    members = build(config, prepare(config, stores))
    fit(members, open_inputs(config, stores), folds_of(config, stores), config.recipe)
    return members


@pytest.fixture(scope="module")
def trained(config, local_ray):
    """Two workers, of which one is killed in the middle of an epoch, and the report at the end."""
    killed = []

    def kill_a_worker_in_the_fourth_epoch():
        status = f"{config.out}/status.json"
        while True:
            time.sleep(0.02)
            try:
                with Path(status).open(encoding="utf-8") as file:
                    done = json.load(file)["done"]
            except (OSError, ValueError):
                continue
            if done >= 3:
                break
        for process in psutil.Process().children(recursive=True):
            if any("RayTrainWorker" in part for part in process.cmdline()):
                process.send_signal(signal.SIGKILL)
                killed.append(done)
                return

    threading.Thread(target=kill_a_worker_in_the_fourth_epoch, daemon=True).start()
    assert train_fusion_job(config) == 0
    assert killed[0] < config.recipe.epochs
    return config.out


@pytest.mark.timeout(170)
def test_two_workers_and_a_killed_one_follow_the_curve_of_one_process(trained, config):
    with Path(f"{trained}/temperature.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for n, member in enumerate(in_this_process(config)):
        found = [(float(r["loss"]), float(r["tau"])) for r in rows if r["network"] == str(n)]
        assert found == member.temperature.trace
        network = load_artefact(trained).networks[n]
        for key, value in member.network.state_dict().items():
            assert torch.equal(network.state_dict()[key], value)


@pytest.mark.timeout(170)
def test_the_report_is_out_of_fold_and_beside_convex_weights(trained):
    with Path(f"{trained}/report/metrics.json").open(encoding="utf-8") as file:
        systems = {system["name"]: system for system in json.load(file)["systems"]}
    assert systems["lightfusion"]["kind"] == "learned"
    versus = systems["lightfusion"]["vs"]
    assert {"mean@zscore", "convex@zscore", "convex@zscore+bank"} <= set(versus)
    with Path(f"{trained}/config.json").open(encoding="utf-8") as file:
        about = json.load(file)
    assert about["metrics"]["lightfusion"]["R@10"] == systems["lightfusion"]["metrics"]["R@10"]
    with Path(f"{trained}/report/report.html").open(encoding="utf-8") as file:
        page = file.read()
    assert "lightfusion is " in page
    assert "Query bank: labelled val, the queries of the store, less the own fold" in page
    assert page.count("data:image/svg+xml") == 2


@pytest.mark.timeout(170)
def test_a_query_is_ranked_by_the_network_that_did_not_see_it(trained, stores):
    artefact = load_artefact(trained)
    learned = artefact.on(stores[0]).learned
    chunk = next(masked_scores(stores[0]))
    rows = np.array(chunk.rows)
    ranked = learned(chunk.scores_MBN, rows)
    for b in range(5):
        fold = artefact.fold_of[0][stores[0].queries[b].id]
        [(network, _)] = [
            (network, held_out)
            for network, (held_out, _) in zip(
                artefact.networks, artefact.about.members, strict=True
            )
            if held_out == fold
        ]
        given = learned.inputs.read(rows[b : b + 1])
        alone = network(learned.inputs.complete(given, fold), given.absent_BN)[0].detach()
        kept = ~np.isnan(ranked[b])
        np.testing.assert_allclose(ranked[b][kept], alone[kept], atol=1e-5)


@pytest.mark.timeout(170)
def test_new_queries_are_ranked_by_all_networks_or_by_their_mean(trained, stores):
    artefact = load_artefact(trained)
    test = stores[1]
    chunk = next(masked_scores(test))
    rows = np.array(chunk.rows)
    fitted = artefact.on(test)
    assert not fitted.out_of_fold
    ensemble = fitted.learned(chunk.scores_MBN, rows)
    one_each = [
        replace(fitted.learned, networks={NOBODY: (network,)})(chunk.scores_MBN, rows)
        for network in artefact.networks
    ]
    np.testing.assert_allclose(ensemble, np.mean(one_each, axis=0), atol=1e-5)
    averaged = replace(artefact, about=replace(artefact.about, new_queries="weights"))
    [network] = averaged.new_networks
    heads = [one.head.detach().numpy() for one in artefact.networks]
    np.testing.assert_allclose(network.head.detach(), np.mean(heads, axis=0), atol=1e-6)
    close = averaged.on(test).learned(chunk.scores_MBN, rows)
    assert np.nanmean(np.abs(close - ensemble)) < 0.25 * np.nanstd(ensemble)


@pytest.mark.timeout(170)
def test_a_store_that_lost_a_model_is_still_ranked(trained, stores, tmp_path, capsys):
    """The tiles of a model that never finished: three of three become two."""
    test = stores[1]
    lost = score_store(
        tmp_path / "lost", labelled_dataset(120, 60, seed=7, split="test"), MODELS, GRID, 7, 2.0
    )
    for path in lost.storage.list("records/scores/c"):
        lost.storage.delete(path)
    hits = {}
    for name, store in (("whole", test), ("lost", lost)):
        out = tmp_path / f"{name}.parquet"
        ranked = ["rank", store.uri, "--fusion", trained, "--top", "10", "--out", str(out)]
        assert main(ranked) == 0
        found = pq.read_table(out).to_pylist()
        targets = {query.id: query.targets for query in store.queries}
        hits[name] = sum(row["candidate"] in targets[row["query"]] for row in found)
    assert "lightfusion does without c" in capsys.readouterr().err
    single = _hits_of(test, "a")
    assert single < hits["lost"] <= hits["whole"] + 3


def _hits_of(store, model):
    found = 0
    for chunk in masked_scores(store):
        scores = chunk.scores_MBN[store.models.index(model)]
        for row, q in zip(scores, chunk.rows, strict=True):
            first = np.argsort(-np.nan_to_num(row, nan=-9e9), kind="stable")[:10]
            found += any(store.gallery_ids[n] in store.queries[q].targets for n in first)
    return found


@pytest.mark.timeout(170)
def test_an_artefact_is_refused_where_it_does_not_belong(trained, stores, tmp_path):
    artefact = load_artefact(trained)
    strangers = score_store(tmp_path / "x", labelled_dataset(20, 9, split="x"), ("d", "e"))
    with pytest.raises(DataError, match="was trained on a, b, c"):
        artefact.on(strangers)
    on_all = replace(artefact, about=replace(artefact.about, protocol="train->val"))
    with pytest.raises(DataError, match="would be a leak"):
        on_all.on(stores[0])
    assert on_all.on(stores[1]).learned is not None
    other = replace(artefact.about.stores[0].models["a"], weights_digest="else")
    changed = replace(
        artefact.about.stores[0], models={**artefact.about.stores[0].models, "a": other}
    )
    with pytest.raises(DataError, match="model a has other weights"):
        replace(artefact, about=replace(artefact.about, stores=(changed,))).on(stores[1])


@pytest.mark.timeout(170)
def test_of_two_trainings_in_one_folder_the_second_stops(trained, config):
    with (
        writing(open_storage(config.out)),
        pytest.raises(MachineError, match="another run is writing"),
    ):
        train_fusion(config)


@pytest.mark.timeout(170)
def test_the_same_command_again_keeps_the_result_and_another_is_refused(trained, config):
    before = load_artefact(trained)
    train_fusion(config)
    for one, two in zip(before.networks, load_artefact(trained).networks, strict=True):
        assert all((one.state_dict()[k] == v).all() for k, v in two.state_dict().items())
    with pytest.raises(ConfigError, match=r"another configuration \(recipe differ\)"):
        train_fusion(replace(config, recipe=replace(config.recipe, epochs=3)))


def test_the_start_is_the_convex_solution_with_its_bank(config):
    stores = open_stores(config)
    plan = prepare(config, stores)
    [inputs] = open_inputs(config, stores)
    member = build(config, plan)[1]
    static = plan.convex[1]
    assert (member.held_out, static.held_out) == (1, 1)
    given = inputs.read(np.arange(4))
    weights = np.array([static.weights[name] for name in MODELS], np.float32)
    expected = given.scores_BNM.numpy() @ weights
    expected -= static.strength * np.einsum("m,mbn->bn", weights, inputs.bank.hubs(given.rows_B, 1))
    found = member.network(inputs.complete(given, 1)).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The same as the row of the table, for queries of the fold that is held out.
    own = np.flatnonzero(folds_of(config, stores)[0] == 1)
    row = banked_convex(Convex(static.weights, "val"), inputs.bank, static.strength)
    expected = row(scores_of(stores[0], own), own)
    held = inputs.read(own)
    found = member.network(inputs.complete(held, 1), held.unseen_BN).detach().numpy()
    kept = ~np.isnan(expected)
    np.testing.assert_allclose(found[kept], expected[kept], atol=1e-5)
    mean = build(replace(config, start="mean"), plan)[0].network
    assert isinstance(mean, LightFusion)
    assert mean.head.tolist()[:3] == pytest.approx([1 / 3] * 3)


def test_tau_of_raw_scores_is_divided_by_their_deviation(config):
    raw = replace(config, recipe=replace(config.recipe, tau=0.02, tau_unit="raw"))
    stores = open_stores(raw)
    deviations = [
        np.nanstd(chunk.scores_MBN, axis=-1).ravel() for chunk in masked_scores(stores[0])
    ]
    expected = 0.02 / np.concatenate(deviations).mean()
    assert prepare(raw, stores).tau == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ("a", "z")}, "does not hold 'z'"),
        ({"references": ("a",)}, "no image features of a"),
        ({"validation": "/nowhere", "protocol": "train->val"}, "is not a tile store"),
    ],
)
def test_what_a_store_does_not_hold_is_refused_before_training(config, change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        open_stores(replace(config, **change))


def test_a_validation_that_was_learned_from_is_refused_before_training(config):
    leaking = replace(config, protocol="train->val", validation=config.store)
    with pytest.raises(DataError, match="would be a leak"):
        open_stores(leaking)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "train->val"}, "needs `validation`"),
        ({"normalisation": "none"}, "set start: mean"),
        ({"folds": 2}, "folds at least 3"),
        ({"bank_t": 0.0}, "profiles come from a query bank"),
        ({"store": ()}, "name at least one"),
    ],
)
def test_contradictions_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)
