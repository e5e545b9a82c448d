import numpy as np
import pytest

from dafm_ray.errors import ConfigError, DataError
from dafm_ray.report.audits.modality import audit_modality
from dafm_ray.tiles.store import feature_key
from tests.samples import labelled_dataset, matrix_store, score_matrix, score_store

SIGNALS = {"test:both": 1.8, "zeroshot:image": 1.0, "zeroshot:text": 0.2}


@pytest.fixture
def store(tmp_path):
    dataset = labelled_dataset(60, 90)
    matrices = {
        f"{id}@random": score_matrix(dataset, n, signal)
        for n, (id, signal) in enumerate(SIGNALS.items())
    }
    return matrix_store(tmp_path / "s", dataset, matrices)


def test_models_of_one_modality_are_known_by_their_family(store):
    found = audit_modality(store)
    judged = found.details["R@10"]
    assert found.table.header[-2] == "both"
    assert 90 > judged["composed"] > judged["image"] > judged["text"] > 0
    assert max(judged["image"], judged["text"]) <= judged["either"] <= 90
    assert judged["composed_rest"] <= 90 - judged["either"]
    assert "image or text" in found.notes[0]


def test_models_may_be_named(store):
    swapped = audit_modality(store, image_only="text", text_only="image").details["R@10"]
    plain = audit_modality(store).details["R@10"]
    assert (swapped["image"], swapped["text"]) == (plain["text"], plain["image"])
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        audit_modality(store, image_only="imge")


def test_a_missing_modality_is_said(store):
    found = audit_modality(store.of(["both", "image"]))
    assert "No system sees the text alone" in found.notes[1]
    assert {row[2] for row in found.table.rows} == {"-"}


def test_nothing_of_one_modality_is_refused(tmp_path):
    with pytest.raises(DataError, match="no system of one modality; add zeroshot:image"):
        audit_modality(score_store(tmp_path / "s", labelled_dataset(20, 9)))


def test_nothing_that_composes_is_refused(store):
    with pytest.raises(DataError, match="no system of both modalities"):
        audit_modality(store.of(["image", "text"]))


def test_the_similarity_of_images_stands_for_the_image_alone(tmp_path):
    dataset = labelled_dataset(60, 90)
    store = matrix_store(tmp_path / "s", dataset, {"test:both@random": score_matrix(dataset, 0)})
    features_ND = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
    store.write(feature_key("both", "gallery", 0), features_ND)
    found = audit_modality(store)
    hits = 0
    for query in store.queries:
        reference, target = (store.positions[id] for id in (query.reference, *query.targets))
        similar_N = features_ND @ features_ND[reference]
        similar_N[reference] = -np.inf
        hits += (similar_N > similar_N[target]).sum() < 10
    assert found.details["R@10"]["image"] == hits
    assert "both's image similarity" in found.notes[0]
