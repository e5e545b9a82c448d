import numpy as np

from dafm_ray.fusion.kept import Kept

NAN = np.nan
KEPT = Kept.of(np.array([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=bool))


def test_kept_candidates_stand_side_by_side_in_stored_order():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    gathered = KEPT.gather(values)
    assert gathered.dtype == np.float32
    np.testing.assert_equal(gathered, [[1, 3], [NAN, NAN], [8, NAN]])
    assert KEPT.columns().tolist() == [[1, 3], [-1, -1], [0, -1]]


def test_they_return_to_their_places():
    scattered = KEPT.scatter(np.array([[5.0, 6.0], [7.0, 7.0], [8.0, 9.0]]))
    np.testing.assert_equal(scattered, [[NAN, 5, NAN, 6], [NAN] * 4, [8, NAN, NAN, NAN]])


def test_a_query_may_keep_none():
    assert Kept.of(np.zeros((2, 3), dtype=bool)).columns().shape == (2, 0)
