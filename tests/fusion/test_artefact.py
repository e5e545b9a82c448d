import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dafm_ray.cli import main
from dafm_ray.config import FusionConfig, NetworkConfig, Recipe
from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import columns_of, rank_targets
from dafm_ray.fusion.artefact import CONFIG, FOLDS, WEIGHTS, load_artefact
from dafm_ray.fusion.bank import own_bank
from dafm_ray.fusion.fit import fit
from dafm_ray.fusion.folds import NOBODY
from dafm_ray.fusion.rank import scores_of
from dafm_ray.fusion.train import (
    artefact_of,
    build,
    folds_of,
    open_inputs,
    open_stores,
    prepare,
    traces_of,
)
from dafm_ray.models.checkpoints import TRAINED_ON
from dafm_ray.tiles.manifest import Grid
from tests.samples import labelled_dataset, matrix_store, score_matrix, score_store

MODELS = ("a", "b")
GRID = Grid(64, 30, 80)
RECIPE = Recipe(epochs=2, batch=32)


def trained(out, *stores, **change):
    """A trained fusion, without Ray."""
    config = FusionConfig(
        store=tuple(store.uri for store in stores),
        out=str(out),
        folds=3,
        network=NetworkConfig(width=4),
        recipe=RECIPE,
    )
    config = replace(config, **change)
    opened = open_stores(config)
    plan = prepare(config, opened)
    members = build(config, plan)
    fit(members, open_inputs(config, opened), folds_of(config, opened), RECIPE)
    artefact_of(config, opened, plan, members).save(out, traces_of(members))
    return load_artefact(out)


@pytest.fixture(scope="module")
def categories(tmp_path_factory):
    """Two galleries with references kept, as two categories of FashionIQ."""
    root = tmp_path_factory.mktemp("categories")
    return [
        score_store(
            root / split,
            labelled_dataset(candidates, 70, seed=n, split=split, policy="keep"),
            MODELS,
            GRID,
            seed=n,
            signal=2.0,
        )
        for n, (split, candidates) in enumerate([("dress", 60), ("shirt", 80)])
    ]


@pytest.fixture(scope="module")
def artefact(categories, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("fusion") / "out", *categories)


def test_one_fusion_of_several_galleries_ranks_each_out_of_fold(artefact, categories):
    for store in categories:
        fitted = artefact.on(store)
        rows = np.arange(store.size("queries"))
        scores = scores_of(store, rows)
        targets = columns_of([query.targets for query in store.queries], store.positions)
        rank = {s.name: rank_targets(s(scores, rows), targets).stored for s in fitted.systems}
        assert list(rank) == ["convex@zscore", "convex@zscore+bank", "lightfusion"]
        assert np.log2(rank["lightfusion"]).mean() < np.log2(rank["convex@zscore"]).mean() + 0.5
        assert (fitted.learned.fold_of_Q != NOBODY).all()
        assert fitted.out_of_fold


def test_convex_weights_of_a_query_are_those_searched_without_its_fold(artefact, categories):
    store = categories[0]
    fitted = artefact.on(store)
    rows = np.arange(20)
    scores = scores_of(store, rows)
    found = fitted.systems[0](scores, rows)
    for b, q in enumerate(rows):
        fold = artefact.fold_of[0][store.queries[q].id]
        own = fitted.systems[0].parts[fold]
        static = next(one for one in artefact.about.convex if one.held_out == fold)
        assert own.weights == static.weights
        alone = own(scores[:, b : b + 1], rows[b : b + 1])
        np.testing.assert_array_equal(found[b], alone[0])


def test_a_query_is_in_no_bank_it_is_ranked_with(artefact, categories):
    """The bank of the training is found again for its own queries."""
    store = categories[0]
    fitted = artefact.on(store)
    folds = np.array([artefact.fold_of[0][query.id] for query in store.queries])
    assert np.array_equal(fitted.bank.fold_of_Q, folds)
    assert fitted.bank.digest == own_bank(store, folds, 1.5).digest


def test_groups_are_not_split_between_folds_or_stores(artefact, categories):
    fold_of_group = {}
    for store, folds in zip(categories, artefact.fold_of, strict=True):
        for query in store.queries:
            fold = fold_of_group.setdefault(query.fold_group, folds[query.id])
            assert fold == folds[query.id]


def test_the_order_of_the_file_is_named_in_tables(categories, tmp_path):
    network = NetworkConfig(width=4, kernel=3, order="file")
    found = trained(tmp_path / "out", categories[0], network=network, sees_reference=True)
    fitted = found.on(categories[0])
    assert fitted.learned.name == "lightfusion(order=file, sees reference)"
    assert "compare with no others" in fitted.notes[0]


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG, FOLDS])
@pytest.mark.parametrize("harm", ["lost", "cut", "other"])
def test_a_damaged_fusion_is_refused_with_one_message(categories, tmp_path, file, harm):
    trained(tmp_path / "out", categories[0])
    path = tmp_path / "out" / file
    if harm == "lost":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:40])
    else:
        path.write_text(json.dumps({"format": 1, "models": 3}))
    with pytest.raises(DataError):
        load_artefact(tmp_path / "out")


def test_a_folder_that_is_no_fusion_is_wrong_usage(categories, tmp_path, capsys):
    asked = ["rank", categories[0].uri, "--fusion", str(tmp_path), "--out", str(tmp_path / "r")]
    assert main(asked) == 2
    assert "no folder of a trained fusion" in capsys.readouterr().err


def test_unrelated_folders_are_not_taken_for_each_other(categories, tmp_path):
    """Every own folder has the same title; only its gallery says which it is."""
    found = trained(tmp_path / "out", categories[0])
    store = categories[1]
    named = replace(store.manifest, dataset={**store.manifest.dataset, "name": "folder"})
    about = replace(found.about.stores[0], title=named.title)
    other = replace(found, about=replace(found.about, stores=(about,)))
    ids = {query.id: 0 for query in store.queries}
    other = replace(other, fold_of=(ids,))
    store.manifest, kept = named, store.manifest
    try:
        assert not other.on(store).out_of_fold
    finally:
        store.manifest = kept


def test_a_fusion_whose_parts_do_not_belong_together_is_refused(categories, tmp_path):
    trained(tmp_path / "out", categories[0])
    file = tmp_path / "out" / CONFIG
    whole = json.loads(file.read_text())
    for change in ({"members": whole["members"][:2]}, {"convex": whole["convex"][:3]}):
        file.write_text(json.dumps({**whole, **change}))
        with pytest.raises(DataError, match="do not belong together"):
            load_artefact(tmp_path / "out")


def test_a_bank_is_not_added_to_a_trained_fusion(tmp_path, categories, capsys):
    trained(tmp_path / "net", categories[0])
    out = str(tmp_path / "out")
    name = f"{tmp_path / 'net'}+bank"
    assert main(["evaluate", categories[0].uri, "--out", out, "--fusion", name]) == 2
    assert "takes no +bank" in capsys.readouterr().err


def test_a_model_that_learned_from_the_same_queries_is_said_in_every_report(tmp_path):
    dataset = labelled_dataset(60, 70, split="train")
    weights = tmp_path / "b.safetensors"
    header = {TRAINED_ON: json.dumps(["labelled train"])}
    save_file({"w": torch.zeros(1)}, weights, metadata=header)
    matrices = {
        "test:a@random": score_matrix(dataset, 0, 2.0),
        f"test:b@{weights}": score_matrix(dataset, 1, 2.0),
    }
    store = matrix_store(tmp_path / "s", dataset, matrices, GRID)
    fusion = trained(tmp_path / "out", store)
    assert fusion.about.stacked == ("b",)
    [note] = [note for note in fusion.on(store).notes if note.startswith("Stacking leak")]
    assert "that b learned from" in note
