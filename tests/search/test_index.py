import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.search import index as index_module
from dafm_ray.search.index import Block, FlatIndex, Unusable
from dafm_ray.search.sharded import ShardedIndex

FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tied_features(seed, shape):
    """Vectors of (+-1/2, ...) have exact dot products, and few different ones."""
    return np.random.default_rng(seed).choice([-0.5, 0.5], (*shape, 4)).astype(np.float32)


def block(features, first=0):
    return Block([f"c{first + n}" for n in range(len(features))], features)


def sorted_scores(queries_QD, features, k):
    several = features if features.ndim == 3 else features[:, None]
    scores_QN = np.einsum("qd,nvd->qnv", queries_QD, several, dtype=np.float64).max(2)
    scores_QN = scores_QN.astype(np.float32)
    order_QK = np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores_QN, order_QK, axis=1), order_QK


def unit(values):
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@FEW
@given(st.integers(0, 999), st.integers(1, 60), st.sampled_from([(), (1,), (3,)]), st.data())
def test_the_first_k_are_those_of_sorting_all(seed, candidates, vectors, data):
    features = tied_features(seed, (candidates, *vectors))
    queries_QD = tied_features(seed + 1, (7,))
    k = data.draw(st.integers(1, candidates))
    scores_QK, columns_QK = FlatIndex([block(features)]).search(queries_QD, k)
    expected, order_QK = sorted_scores(queries_QD, features, k)
    assert (scores_QK.dtype, columns_QK.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(columns_QK, order_QK)
    np.testing.assert_array_equal(scores_QK, expected)


@pytest.mark.parametrize("vectors", [(), (5,)])
def test_twins_tie_whatever_the_batch_and_their_place(vectors):
    """A matrix product rounds equal vectors differently; the order may not depend on it."""
    rng = np.random.default_rng(0)
    some = unit(rng.standard_normal((301, *vectors, 37)))
    features = np.concatenate([some, some[::-1], some])
    queries_QD = unit(rng.standard_normal((45, 37)))
    index = FlatIndex([block(features[:500]), block(features[500:], 500)])
    scores_QK, columns_QK = index.search(queries_QD, 31)
    np.testing.assert_array_equal(columns_QK, sorted_scores(queries_QD, features, 31)[1])
    np.testing.assert_array_equal(index.scores(queries_QD, columns_QK), scores_QK)
    for q in (0, 44):
        alone = index.search(queries_QD[q : q + 1], 31)
        np.testing.assert_array_equal(alone[0][0], scores_QK[q])
        np.testing.assert_array_equal(alone[1][0], columns_QK[q])


def test_ties_at_place_k_are_searched_to_their_end(monkeypatch):
    features = np.tile(unit(np.ones((1, 8))), (5000, 1))
    monkeypatch.setattr(index_module, "FOUND_AT_ONCE", 100)
    scores_QK, columns_QK = FlatIndex([block(features)]).search(features[:3], 4)
    assert columns_QK.tolist() == [[0, 1, 2, 3]] * 3
    assert len(np.unique(scores_QK)) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("vectors", [(), (3,)])
def test_shards_answer_as_one_index(local_ray, vectors):
    features = tied_features(3, (50, *vectors))
    queries_QD = tied_features(4, (9,))
    parts = [block(features[n : n + 7], n) for n in range(0, 50, 7)]
    parts[2] = parts[2]._replace(unusable=[Unusable("x", "why")])
    flat = FlatIndex(parts)
    with ShardedIndex(iter(parts), 50, 3) as sharded:
        assert (list(sharded.ids), sharded.unusable) == (flat.ids, flat.unusable)
        assert len(sharded._actors) == 3
        columns_QK = np.arange(54).reshape(9, 6) % 51 - 1
        for k in (1, 17, 20, 50):
            for one, other in zip(
                sharded.search(queries_QD, k), flat.search(queries_QD, k), strict=True
            ):
                np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(
            sharded.scores(queries_QD, columns_QK), flat.scores(queries_QD, columns_QK)
        )
        asked = np.array([49, 0, 17, 17, 33, 2])
        np.testing.assert_array_equal(sharded.images(asked), flat.images(asked))
        with pytest.raises(DataError, match="k is 51, and the index has 50"):
            sharded.search(queries_QD, 51)
        with pytest.raises(DataError, match=r"this index takes \(Q, 4\)"):
            sharded.search(queries_QD[:, :3], 5)


@pytest.mark.timeout(120)
def test_the_actors_of_shards_end(local_ray):
    import ray

    with ShardedIndex([block(tied_features(0, (5,)))], 5, 2) as sharded:
        actors = list(sharded._actors)
    for actor in actors:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.search.remote(tied_features(1, (1,)), 1))
    with pytest.raises(DataError, match="no image of the gallery can be used"):
        ShardedIndex([Block([], np.empty(0), [Unusable("x", "why")])], 5, 2)


def test_a_saved_index_is_the_same(tmp_path):
    features = tied_features(0, (20, 3))
    first = FlatIndex([block(features)._replace(unusable=[Unusable("x", "the file is empty")])])
    first.save(tmp_path / "i", "made from")
    assert {file.name for file in (tmp_path / "i").iterdir()} == {
        "index.faiss",
        "ids.arrow",
        "index.json",
    }
    again = FlatIndex.load(tmp_path / "i", "made from")
    assert (again.ids, again.unusable, len(again)) == (first.ids, first.unusable, 20)
    np.testing.assert_array_equal(again.vectors, features)
    queries_QD = tied_features(1, (4,))
    np.testing.assert_array_equal(again.search(queries_QD, 9)[1], first.search(queries_QD, 9)[1])


def test_a_folder_that_is_not_the_index_is_refused(tmp_path):
    index = FlatIndex([block(tied_features(0, (20,)))])
    with pytest.raises(DataError, match="holds no index"):
        FlatIndex.load(tmp_path / "i", "a")
    index.save(tmp_path / "i", "a")
    with pytest.raises(DataError, match=r"other weights or another gallery .*is a, asked for is b"):
        FlatIndex.load(tmp_path / "i", "b")
    for name in ("index.faiss", "ids.arrow", "index.json"):
        file = tmp_path / "i" / name
        data = file.read_bytes()
        for damaged in (data[:-9], bytes([data[0] ^ 1]) + data[1:], b""):
            file.write_bytes(damaged)
            with pytest.raises(DataError, match=f"damaged: {name}"):
                FlatIndex.load(tmp_path / "i", "a")
        file.write_bytes(data)
    (tmp_path / "i" / "ids.arrow").unlink()
    with pytest.raises(DataError, match=r"ids.arrow cannot be read"):
        FlatIndex.load(tmp_path / "i", "a")


def test_ids_and_vectors_that_disagree_are_refused(tmp_path):
    for name, count in (("i", 20), ("j", 19)):
        FlatIndex([block(tied_features(0, (count,)))]).save(tmp_path / name, "a")
    record = json.loads((tmp_path / "i" / "index.json").read_text())
    other = json.loads((tmp_path / "j" / "index.json").read_text())
    (tmp_path / "j" / "ids.arrow").rename(tmp_path / "i" / "ids.arrow")
    record["checksums"]["ids.arrow"] = other["checksums"]["ids.arrow"]
    (tmp_path / "i" / "index.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="has 19 ids and 20 vectors"):
        FlatIndex.load(tmp_path / "i", "a")


def test_wrong_features_and_questions():
    features = tied_features(0, (6,))
    index = FlatIndex([block(features)])
    for k, error, message in (
        (7, DataError, "k is 7, and the index has 6 candidates"),
        (0, ConfigError, "at least 1"),
    ):
        with pytest.raises(error, match=message):
            index.search(features, k)
    with pytest.raises(DataError, match="no numbers"):
        index.search(features * np.nan, 2)
    with pytest.raises(DataError, match="c1 have length 2"):
        FlatIndex([block(features * np.array([[1], [2], [1], [1], [1], [1]]))])
    with pytest.raises(DataError, match=r"shape \(3,\), those before \(4,\)"):
        index.add(block(unit(np.ones((2, 3)))))
    with pytest.raises(DataError, match="3 candidates have features of shape"):
        FlatIndex([Block(["a", "b", "c"], features)])
    with pytest.raises(DataError, match="no image of the gallery"):
        FlatIndex([])
