from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.progress import progress
from dafm_ray.tiles.manifest import Grid
from dafm_ray.tiles.shortlist import first_of, list_candidates, merged, moments, union
from dafm_ray.tiles.similarity import score_tiles
from dafm_ray.tiles.store import TileStore, columns_key, score_key
from tests.samples import feature_store, labelled_dataset, search_features

pytestmark = pytest.mark.timeout(150)

MODELS = ("m0", "m1", "m2")
K = 6


def filled(store, how=list_candidates):
    with progress("similarity", 1, unit="tile") as shown:
        how(store, MODELS, shown)
    return TileStore(store.uri)


def listed(scores_MBN, k):
    """The union of the first k of every model, by a stable sort."""
    found = []
    for scores_MN in scores_MBN.transpose(1, 0, 2):
        own = set()
        for scores_N in scores_MN:
            order = np.argsort(np.where(np.isnan(scores_N), np.inf, -scores_N), kind="stable")
            own |= {int(n) for n in order[:k] if not np.isnan(scores_N[n])}
        found.append(sorted(own))
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_spans_list_what_a_stable_sort_of_the_whole_gallery_does(data):
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    models, queries, candidates = 2, 3, data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, 12))
    scores_MBN = rng.integers(-3, 4, (models, queries, candidates)).astype(np.float32)
    scores_MBN[rng.random(scores_MBN.shape) < 0.2] = np.nan
    scores_MBN[scores_MBN == 3] = -0.0
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, candidates - 1)), max_size=3)))
    edges = [0, *(cut for cut in cuts if cut < candidates), candidates]
    whole = None
    for start, stop in pairwise(edges):
        floor = None if whole is None else whole.floor(k)
        part = first_of(scores_MBN[..., start:stop], start, k, floor)
        whole = part if whole is None else merged([whole, part], k)
    columns_BW, kept_MBW = union(whole)
    assert (columns_BW[:, -1] == -1).all()
    for b, expected in enumerate(listed(scores_MBN, k)):
        own = columns_BW[b][columns_BW[b] >= 0]
        assert own.tolist() == expected
        assert np.array_equal(kept_MBW[:, b, : len(own)], scores_MBN[:, b, own], equal_nan=True)
        assert np.isnan(kept_MBW[:, b, len(own) :]).all()
    expected_MB = [np.nanmean, np.nanstd, np.nanmin, np.nanmax]
    there_MB = ~np.isnan(scores_MBN).all(axis=2)
    for n, of in enumerate(expected_MB):
        own_MB = moments(whole)[..., n]
        assert np.isnan(own_MB[~there_MB]).all()
        for m, b in np.argwhere(there_MB):
            assert own_MB[m, b] == pytest.approx(of(scores_MBN[m, b]), abs=1e-6)


@pytest.fixture(scope="module")
def made(tmp_path_factory, local_ray):
    """All scores, and shortlists under two grids; no test changes them."""
    root = tmp_path_factory.mktemp("shortlist")
    dataset = labelled_dataset(150, 13)
    features = search_features(dataset, len(MODELS))
    whole = filled(feature_store(root / "whole", dataset, features, Grid(8, 5, 64)), score_tiles)
    short = [
        filled(feature_store(root / name, dataset, features, grid, K))
        for name, grid in (("a", Grid(8, 5, 7)), ("b", Grid(8, 4, 150)))
    ]
    return whole, short, dataset, features


def rows_of(store, model):
    """Query -> its candidates and their scores."""
    found = []
    for block in range(len(store.tile_rows)):
        columns_BW, scores_BW = store.shortlist(block), store.scores(model, block)
        for columns_W, scores_W in zip(columns_BW, scores_BW, strict=True):
            there = columns_W >= 0
            assert np.isnan(scores_W[~there]).all()
            found.append((columns_W[there], scores_W[there]))
    return found


def test_scores_have_the_bits_of_whole_tiles_under_any_grid(made):
    whole, short, dataset, _ = made
    scores_MQN = np.stack(
        [np.concatenate([whole.scores(m, q) for q in range(3)]) for m in MODELS]
    ).copy()
    for q, query in enumerate(dataset.queries):
        scores_MQN[:, q, [dataset.gallery.position(id) for id in query.excluded]] = np.nan
    for store in short:
        assert not store.missing()
        for m, model in enumerate(MODELS):
            for q, (columns, scores) in enumerate(rows_of(store, model)):
                assert columns.tolist() == listed(scores_MQN[:, q : q + 1], K)[0]
                assert np.array_equal(scores, scores_MQN[m, q, columns])
    first, second = ([store.moments(model) for model in MODELS] for store in short)
    np.testing.assert_allclose(first, second, rtol=1e-12)


def test_a_list_that_is_lost_is_made_again_the_same(made, tmp_path):
    _, _, dataset, features = made
    store = filled(feature_store(tmp_path / "s", dataset, features, Grid(8, 5, 7), K))
    digest = store.scores_digest
    for path in store.storage.list("records/scores/m1"):
        store.storage.delete(path)
    for path in store.storage.list("records/columns"):
        store.storage.delete(path)
    store = TileStore(store.uri)
    assert store.missing() == store.score_keys("m1")
    assert filled(store).scores_digest == digest


def test_a_quarantined_image_that_is_mended_makes_every_list_anew(made, tmp_path):
    _, _, dataset, features = made
    store = filled(feature_store(tmp_path / "s", dataset, features, Grid(8, 5, 7), K))
    store.forget("queries", 0)
    assert store.finished().isdisjoint({columns_key(0), columns_key(1), score_key("m0", 1, 0)})
    assert columns_key(2) in store.finished()
    store.forget("gallery", 3)
    assert not {key for key in store.finished() if not key.startswith("features/")}


def test_infinite_scores_end_the_job(made, tmp_path):
    _, _, dataset, features = made
    queries_QD, gallery_ND = features["m0"]
    huge = {name: features[name] for name in MODELS} | {
        "m0": (queries_QD * np.float32(3e38), gallery_ND * 3)
    }
    store = feature_store(tmp_path / "s", dataset, huge, Grid(8, 5, 64), K)
    with pytest.raises(DataError, match="m0 gives infinite scores"):
        filled(store)


def test_a_store_keeps_its_kind_and_its_models(made):
    whole, (store, _), dataset, _ = made
    models = store.manifest.models
    spec, grid = store.manifest.dataset, store.manifest.grid
    with pytest.raises(DataError, match="keeps the first 6 candidates of each model, not the sc"):
        TileStore.create(store.uri, dataset, spec, models, grid, "float32")
    fourth = {**models, "m3": replace(models["m0"], weights_digest="m3")}
    with pytest.raises(DataError, match="other models would find others"):
        TileStore.create(store.uri, dataset, spec, fourth, grid, "float32", K)
    with pytest.raises(DataError, match="keeps the scores of all candidates, not the first 6"):
        TileStore.create(whole.uri, dataset, spec, models, grid, "float32", K)
    with pytest.raises(ConfigError, match="An export needs the scores of all candidates"):
        store.refuse_shortlist("An export")
    whole.refuse_shortlist("An export")
