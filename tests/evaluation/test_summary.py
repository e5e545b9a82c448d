import numpy as np
import pytest

from dafm_ray.datasets import base
from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.metrics import rank_targets
from dafm_ray.evaluation.protocols import PROTOCOLS, Protocol, protocol
from dafm_ray.evaluation.summary import Summary, SystemRanks

SCORES = np.array([[3, 2, 1], [1, 2, 3], [2, 2, 2], [1, 3, 2]], dtype=np.float32)
RANKS = rank_targets(SCORES, np.array([[0], [0], [1], [0]]))


def summary(rules: Protocol, categories=("a", "a", "a", "b")) -> Summary:
    return Summary(SystemRanks("x", "single", RANKS, RANKS), rules, list(categories))


def test_cirr_has_recall_subset_recall_and_their_mean():
    found = summary(protocol("cirr"))
    assert found.columns == ("R@1", "R@5", "R@10", "R@50", "Rsubset@1", "Rsubset@2", "Rsubset@3")
    assert found.percent("R@1") == 25.0
    assert found.percent("Rmean") == (100 + 25) / 2


def test_hits_by_luck():
    luck = summary(protocol("cirr")).total_hits()
    assert luck["hits"]["R@1"] == 1
    assert luck["hits_best"]["R@1"] == 2
    assert luck["hits_worst"]["R@1"] == 1
    assert luck["hits_expected"]["R@1"] == pytest.approx(1 + 1 / 3, abs=1e-4)


def test_a_macro_mean_weighs_categories_alike():
    assert summary(Protocol((1,), macro=True)).percent("R@1") == pytest.approx(100 * (1 / 3) / 2)


def test_a_macro_protocol_shows_each_category_and_adds_their_hits():
    rules = Protocol((1, 2), mean_of=("R@1", "R@2"), macro=True)
    found = summary(rules, ("b", "a", "b", "b"))
    assert found.columns == ("a R@1", "a R@2", "b R@1", "b R@2", "R@1", "R@2")
    hits = found.total_hits()["hits"]
    assert hits["R@2"] == hits["a R@2"] + hits["b R@2"]
    assert found.percent("R@2") == pytest.approx(
        (found.percent("a R@2") + found.percent("b R@2")) / 2
    )
    assert found.percent("Rmean") == pytest.approx(
        (found.percent("R@1") + found.percent("R@2")) / 2
    )
    assert np.isnan(found.values["a R@1"]).tolist() == [True, False, True, True]


def test_one_category_alone_has_no_columns_of_its_own():
    assert summary(protocol("fashioniq"), "aaaa").columns == ("R@10", "R@50")


def test_every_protocol_label_has_its_numbers():
    assert set(PROTOCOLS) == set(base.PROTOCOLS)


def test_own_data_has_average_precision():
    assert "mAP@5" in summary(protocol("folder")).values


def test_without_groups_there_is_no_subset_recall():
    found = Summary(SystemRanks("x", "single", RANKS, None), protocol("cirr"), ["a"] * 4)
    assert found.columns == ("R@1", "R@5", "R@10", "R@50")
    assert "Rmean" not in found.values


def test_unknown_protocol():
    with pytest.raises(ConfigError, match="no protocol 'coco'"):
        protocol("coco")
