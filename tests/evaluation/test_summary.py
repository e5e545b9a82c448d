import numpy as np
import pytest

from dafm_ray.errors import ConfigError
from dafm_ray.evaluation.metrics import rank_targets
from dafm_ray.evaluation.protocols import Protocol, protocol
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


def test_own_data_has_average_precision():
    assert "mAP@5" in summary(protocol("folder")).values


def test_without_groups_there_is_no_subset_recall():
    found = Summary(SystemRanks("x", "single", RANKS, None), protocol("cirr"), ["a"] * 4)
    assert found.columns == ("R@1", "R@5", "R@10", "R@50")
    assert "Rmean" not in found.values


def test_unknown_protocol():
    with pytest.raises(ConfigError, match="no protocol 'coco'"):
        protocol("coco")
