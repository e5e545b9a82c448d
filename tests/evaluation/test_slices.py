import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.slices import by_mention, slices


def queries(lengths, categories=None):
    return [
        Query(
            f"q{n}", "r", (" ".join(["w"] * length),), category=categories[n] if categories else ""
        )
        for n, length in enumerate(lengths)
    ]


def test_lengths_are_cut_into_three_parts():
    found = slices(queries([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert [part.name for part in found] == ["up to 3 words", "4 to 6 words", "more than 6 words"]
    assert [part.queries.tolist() for part in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_texts_of_one_length_are_not_cut():
    assert slices(queries([4, 4, 4])) == ()


def test_several_captions_count_together():
    both = Query("q", "r", ("a b", "c"))
    found = slices([both, *queries([9, 9])])
    assert found[0].name == "up to 3 words"


def test_categories_come_first_where_there_are_several():
    found = slices(queries([2, 2, 2], ["shirt", "dress", "shirt"]))
    assert [(part.name, part.queries.tolist()) for part in found] == [
        ("dress", [1]),
        ("shirt", [0, 2]),
    ]
    assert slices(queries([2, 2], ["dress", "dress"])) == ()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_every_query_is_in_one_part_of_the_lengths(lengths):
    found = slices(queries(lengths))
    if found:
        together = np.concatenate([part.queries for part in found])
        assert sorted(together.tolist()) == list(range(len(lengths)))
        assert all(len(part.queries) for part in found)
        longest = [max(lengths[q] for q in part.queries) for part in found]
        assert longest == sorted(longest)


def test_texts_that_mention_a_colour_or_a_pattern_are_parts():
    texts = ["is Darker", "has stripes", "a red floral print", "is longer"] * 30
    asked = [Query(f"q{n}", "r", (text, "and so on")) for n, text in enumerate(texts)]
    found = {part.name: part.queries.tolist() for part in slices(asked)}
    assert found["mention a colour"] == [n for n in range(120) if n % 4 in (0, 2)]
    assert found["mention a pattern"] == [n for n in range(120) if n % 4 in (1, 2)]
    parts = by_mention(asked)
    assert [part.name for part in parts] == ["mention a colour", "mention a pattern", "other texts"]
    assert parts[-1].queries.tolist() == [n for n in range(120) if n % 4 == 3]
    assert not by_mention(asked[:40])
    assert not any("mention" in part.name for part in slices(asked[:40]))
    assert not any("mention" in part.name for part in slices(asked[::4]))
