from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dafm_ray.config import EvaluateConfig, FusionConfig, Recipe, StudyConfig, parse_config
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.evaluation.metrics import UNRANKED
from dafm_ray.evaluation.protocols import protocol
from dafm_ray.fusion import systems
from dafm_ray.fusion.artefact import load_artefact
from dafm_ray.fusion.candidates import columns_in, moments_of, positions_in
from dafm_ray.fusion.convex import search_convex
from dafm_ray.fusion.normalise import NORMALISATIONS
from dafm_ray.fusion.rank import rank_systems, scores_of, singles
from dafm_ray.fusion.rankings import write_rankings
from dafm_ray.fusion.static import static_fusion
from dafm_ray.fusion.systems import Maker
from dafm_ray.fusion.train import train_fusion
from dafm_ray.fusion.tune import run_study
from dafm_ray.progress import progress
from dafm_ray.report.audits.modality import audit_modality
from dafm_ray.report.audits.shortlist import audit_shortlist
from dafm_ray.report.evaluate import evaluate
from dafm_ray.tiles.ingest import ingest
from dafm_ray.tiles.manifest import Grid
from dafm_ray.tiles.shortlist import first_of, list_candidates, moments, union
from dafm_ray.tiles.similarity import score_tiles
from dafm_ray.tiles.store import TileStore, columns_key, moments_key, score_key
from tests.samples import feature_store, labelled_dataset, search_features

pytestmark = pytest.mark.timeout(170)

MODELS = ("m0", "m1", "m2")
GALLERY, QUERIES, K = 400, 60, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory, local_ray):
    """All scores of a gallery, and the shortlists; no test changes them."""
    root = tmp_path_factory.mktemp("candidates")
    dataset = labelled_dataset(GALLERY, QUERIES)
    features = search_features(dataset, len(MODELS), signal=1.2)
    found = []
    for name, how, k in (("whole", score_tiles, 0), ("short", list_candidates, K)):
        store = feature_store(root / name, dataset, features, Grid(32, 16, 100), k)
        with progress("similarity", 1, unit="tile") as shown:
            how(store, MODELS, shown)
        found.append(TileStore(store.uri))
    return found


def ranks(store, systems):
    with progress("rank", 1, unit="query") as shown:
        return rank_systems(store, systems, protocol("cirr"), shown)


def test_columns_and_positions_are_inverse(made):
    whole, short = made
    rows = np.array([3, 40, 17])
    listed = [short.shortlist(q // 16)[q % 16] for q in rows.tolist()]
    ids = [[short.gallery_ids[n] for n in listed_W[:3]] for listed_W in listed]
    columns = columns_in(short, rows, ids)
    assert columns.tolist() == [[0, 1, 2]] * 3
    assert np.array_equal(positions_in(short, rows, columns), [row[:3] for row in listed])
    absent = next(n for n in range(GALLERY) if n not in listed[0])
    columns = columns_in(short, rows[:1], [[short.gallery_ids[absent], ids[0][0]]])
    assert columns.tolist() == [[len(listed[0]) - 1, 0]]
    assert np.isnan(scores_of(short, rows[:1])[:, 0, columns[0, 0]]).all()
    assert columns_in(short, rows, [[ids[0][0]], [], []])[1:].tolist() == [[-1], [-1]]
    assert columns_in(whole, rows, ids)[0].tolist() == listed[0][:3].tolist()


@pytest.mark.parametrize("name", ["zscore", "minmax", "dbsf"])
def test_normalisations_are_those_of_the_whole_gallery(made, name):
    whole, short = made
    rows = np.array([0, 16, 59])
    all_MBN = NORMALISATIONS[name](scores_of(whole, rows))
    few_MBW = NORMALISATIONS[name](scores_of(short, rows), moments_of(short).of(rows))
    for b, q in enumerate(rows.tolist()):
        listed_W = short.shortlist(q // 16)[q % 16]
        there = listed_W >= 0
        np.testing.assert_allclose(
            few_MBW[:, b, : len(listed_W)][:, there], all_MBN[:, b, listed_W[there]], atol=2e-5
        )


def test_every_model_ranks_its_own_first_k_as_in_all_scores(made):
    for all_scores, few in zip(*(ranks(store, singles(store)) for store in made), strict=True):
        near = all_scores.ranks.stored <= K
        assert near.any()
        assert (few.ranks.stored[near] == all_scores.ranks.stored[near]).all()
        assert (few.ranks.stored[~near] > K).all()


def test_a_target_that_is_not_listed_is_a_miss_that_counts(made):
    _, short = made
    rows = range(QUERIES)
    targets = columns_in(short, rows, [query.targets for query in short.queries])[:, 0]
    widths = [short.shortlist(q // 16).shape[1] for q in rows]
    lost = targets == np.array(widths) - 1
    assert lost.any()
    assert not lost.all()
    [found] = ranks(short, [static_fusion("mean@zscore", moments=moments_of(short))])
    assert ((found.ranks.stored == UNRANKED) == lost).all()
    assert (found.ranks.targets == 1).all()
    assert found.subset is None


def test_static_fusions_find_what_they_find_in_all_scores(made, tmp_path):
    for name in ("mean@zscore", "combsum@minmax", "mean@dbsf"):
        tops = []
        for store in made:
            file = tmp_path / "top.parquet"
            write_rankings(store, Maker([name]).on(store).systems[0], 10, file)
            rows = pq.read_table(file).to_pylist()
            tops.append({(row["query"], row["candidate"]) for row in rows})
        assert len(tops[0] & tops[1]) >= 0.97 * len(tops[0]), name
    [one, other] = (search_convex(store).weights for store in made)
    assert one.keys() == other.keys()


def test_the_audit_says_what_is_lost(made):
    whole, short = made
    audit = audit_shortlist(short, whole, "mean@zscore")
    assert audit.details["found"]["10"] > 0.99
    assert audit.details["found"]["1"] == 1
    assert 0 < audit.details["listed"] < 1
    assert "of the first 10" in audit.notes[0]
    with pytest.raises(ConfigError, match="keeps no shortlist"):
        audit_shortlist(whole, whole, "mean@zscore")


def test_a_fusion_is_trained_on_shortlists_and_ranks_all_scores_too(made, tmp_path):
    _, short = made
    config = FusionConfig(
        short.uri,
        str(tmp_path / "fusion"),
        folds=3,
        bank_t=0,
        profiles=False,
        recipe=Recipe(epochs=1),
        cases=0,
    )
    train_fusion(config)
    assert load_artefact(config.out).about.bank_t == 0
    tables = [
        evaluate(
            EvaluateConfig(
                store.uri, str(tmp_path / "report"), ("mean@zscore", config.out), cases=1
            )
        ).table
        for store in made
    ]
    for one, other in zip(*(table.rows for table in tables), strict=True):
        assert one.name == other.name
        if one.kind in ("single", "static", "learned"):
            assert one.metrics["R@10"] == pytest.approx(other.metrics["R@10"], abs=2.0), one.name
    assert "Rsubset@1" in tables[0].rows[0].metrics
    assert "Rsubset@1" not in tables[1].rows[0].metrics


def test_what_needs_all_scores_is_refused(made, tmp_path):
    _, short = made
    with pytest.raises(ConfigError, match="set bank_t: 0"):
        train_fusion(FusionConfig(short.uri, str(tmp_path / "fusion"), folds=3))
    learning = [{"recipe.learning_rate": [0.01, 0.02]}]
    study = {"fusion": {"store": short.uri}, "out": str(tmp_path / "s"), "kind": "networks"}
    with pytest.raises(ConfigError, match="set bank_t: 0"):
        run_study(parse_config(StudyConfig, {**study, "spaces": learning}, "study"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no system of one modality"):
        audit_modality(short)
    with pytest.raises(ConfigError, match=r"A query bank .* needs the scores of all candidates"):
        Maker(["mean@zscore+bank"]).on(short)
    plain = FusionConfig(short.uri, str(tmp_path / "f"), folds=3, bank_t=0, profiles=False)
    with pytest.raises(ConfigError, match="sees_reference needs the scores of all"):
        train_fusion(replace(plain, sees_reference=True))


@pytest.mark.parametrize("k", [50, 100])
def test_real_scores_lose_next_to_nothing(reference_material, tmp_path, monkeypatch, k):
    whole = ingest(str(reference_material / "scores" / "cirr_val"), str(tmp_path / "whole")).store
    manifest = whole.manifest
    short = TileStore.create(
        str(tmp_path / "short"),
        replace(labelled_dataset(9, 3), name="cirr"),
        manifest.dataset,
        manifest.models,
        manifest.grid,
        manifest.score_type,
        k,
    )
    for name in manifest.tables:
        short.storage.write(name, whole.storage.read(name))
    short.storage.write("manifest.json", replace(manifest, shortlist=k).to_bytes())
    short = TileStore(short.uri)
    for block, rows in enumerate(whole.tile_rows):
        scores_MBN = scores_of(whole, np.array(rows))
        found = first_of(scores_MBN, 0, k)
        columns_BW, scores_MBW = union(found)
        short.write(columns_key(block), columns_BW)
        for m, model in enumerate(whole.models):
            short.write(moments_key(model, block), moments(found)[m])
            short.write(score_key(model, block, 0), scores_MBW[m])
    details = audit_shortlist(short, whole, "mean@zscore").details
    assert details["found"]["10"] > 0.995
    assert details["found"]["50"] > (0.97 if k == 50 else 0.999)
    assert abs(details["R@10"]["shortlist"] - details["R@10"]["all"]) < 0.05
    assert details["kept"] < 3 * k
    # Normalised among the listed alone, the order is another one.
    monkeypatch.setattr(systems, "moments_of", lambda store: None)
    found = audit_shortlist(short, whole, "mean@zscore").details["found"]
    assert max(found["10"], found["50"]) < 0.9
