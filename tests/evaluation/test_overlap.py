import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.evaluation.overlap import overlap


def test_two_systems_by_hand():
    found = overlap("R@10", {"a": np.array([1, 1, 0, 0, 1]), "b": np.array([1, 0, 1, 0, 0])})
    assert found.metric == "R@10"
    assert found.hits == {"a": 3, "b": 2}
    assert found.gained == {"a": {"b": 2}, "b": {"a": 1}}
    assert found.jaccard == {"a": {"b": 0.25}, "b": {"a": 0.25}}
    assert found.any == 4


def test_systems_without_hits_agree():
    found = overlap("R@1", {"a": np.zeros(3, dtype=int), "b": np.zeros(3, dtype=int)})
    assert found.jaccard["a"]["b"] == 1.0
    assert found.any == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1))
def test_what_pairs_gain_adds_up(rows):
    hits = {name: np.array([row[n] for row in rows], dtype=int) for n, name in enumerate("abc")}
    found = overlap("R@10", hits)
    for name in "abc":
        for other in set("abc") - {name}:
            both = found.hits[name] - found.gained[name][other]
            assert both == found.hits[other] - found.gained[other][name]
    assert max(found.hits.values()) <= found.any <= min(len(rows), sum(found.hits.values()))
