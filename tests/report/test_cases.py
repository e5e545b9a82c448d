import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.report.cases import select

RANKS = {
    "one": [20, 5, 3, None, 8, 100, None],
    "net": [2, 50, 3, 4, 8, None, None],
}
LABELLED = np.arange(7)


def test_the_largest_gains_and_losses_come_first():
    found = list(select(RANKS, "net", "one", LABELLED, 6, 0).items())
    assert found[0] == ("Where net gains most over one", [3, 0])
    assert found[1] == ("Where net loses most to one", [5, 1])
    assert set(found[2][1]) <= {2, 4, 6}


def test_the_best_single_system_leaves_a_sample():
    [(title, queries)] = select(RANKS, "one", "one", LABELLED, 3, 0).items()
    assert title == "A random sample"
    assert len(queries) == 3


@given(st.integers(0, 12), st.integers(0, 5))
def test_no_query_is_shown_twice_and_none_too_many(count, seed):
    found = select(RANKS, "net", "one", np.array([0, 1, 3, 5, 6]), count, seed)
    shown = [q for queries in found.values() for q in queries]
    assert len(shown) == len(set(shown))
    assert set(shown) <= {0, 1, 3, 5, 6}
    assert len(shown) <= count + 2
