import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Query
from dafm_ray.datasets.order import order_leak, position_ranks
from dafm_ray.datasets.registry import read_dataset


def leak_of(config):
    draft = read_dataset(config)
    return order_leak([id for id, _ in draft.images], draft.queries)


@given(st.integers(2, 30), st.data())
def test_ranks_equal_a_sorted_list(size, data):
    reference = data.draw(st.integers(0, size - 1))
    target = data.draw(st.integers(0, size - 1).filter(lambda n: n != reference))
    others = [n for n in range(size) if n != reference]
    others.sort(key=lambda n: (abs(n - reference), n < reference))
    rank = position_ranks(np.array([reference]), np.array([target]), size)
    assert rank.tolist() == [others.index(target) + 1]


def test_the_leak_of_cirr_and_none_of_fashioniq(reference_material):
    """Figures counted independently from the same files."""
    data = reference_material / "data"
    cirr = DatasetConfig("cirr", "val", annotations=str(data / "cirr"))
    leak = leak_of(cirr)
    assert leak is not None
    shares = [round(100 * hits / leak.queries, 2) for hits in leak.hits.values()]
    assert shares == [16.89, 47.24, 62.64, 67.23]
    assert leak.p == 0.001
    for category in ("dress", "shirt", "toptee"):
        config = DatasetConfig(
            "fashioniq", "val", annotations=str(data / "fashioniq"), category=category
        )
        found = leak_of(config)
        assert found is not None
        assert found.p > 0.05


def test_the_best_target_counts_and_queries_without_one_do_not():
    names = [f"n{n}" for n in range(30)]
    queries = [
        Query("a", "n0", ("x",), targets=("n29", "n1")),
        Query("b", "n3", ("x",)),
        Query("c", "n3", ("x",), targets=("elsewhere",)),
    ]
    leak = order_leak(names, queries)
    assert leak is not None
    assert (leak.queries, leak.hits[1]) == (1, 1)
    assert order_leak(names, queries[1:]) is None


def test_a_random_order_does_not_leak():
    rng = np.random.default_rng(5)
    names = [f"n{n}" for n in range(200)]
    pairs = [rng.choice(200, 2, replace=False) for _ in range(400)]
    queries = [
        Query(f"q{q}", names[a], ("x",), targets=(names[b],)) for q, (a, b) in enumerate(pairs)
    ]
    leak = order_leak(names, queries)
    assert leak is not None
    assert leak.p > 0.01
