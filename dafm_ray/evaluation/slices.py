"""Parts of the queries on which systems may differ: categories, kinds and lengths of the text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.metrics import Ints

PARTS = 3
"""Lengths of the text are cut into so many parts of about as many queries each."""

MENTIONS = {
    "a colour": re.compile(
        r"\b(colou?r(ed|s)?|dark(er)?|light(er)?|bright(er)?|black|white|gr[ae]y|red|pink|orange|"
        r"yellow|green|blue|navy|teal|purple|violet|brown|beige|tan|cream|gold(en)?|silver)\b"
    ),
    "a pattern": re.compile(
        r"\b(pattern(s|ed)?|print(s|ed)?|floral|flower(s|ed|y)?|stripe(s|d)?|plaid|check(s|ed|ered)|"
        r"polka|dot(s|ted)?|leopard|zebra|paisley|lace|tie.?dye(d)?|graphic(s)?|logo(s)?|text)\b"
    ),
}
"""What texts are about where fashion is searched: BLIP-2's Q-Former is said to do better on colours
than on patterns.
"""

FEWEST_MENTIONS = 30


@dataclass(frozen=True)
class Slice:
    """Some of the queries.

    Attributes:
        name: as `dress`, or `up to 6 words`.
        queries: their positions, ascending.
    """

    name: str
    queries: Ints


def slices(queries: Sequence[Query]) -> tuple[Slice, ...]:
    """Every category if there are several, texts that mention a colour or a pattern where there are
    enough, then every part of the lengths; none is empty.
    """
    return (*_categories(queries), *_mentions(queries), *_lengths(queries))


def _categories(queries: Sequence[Query]) -> list[Slice]:
    names, category_of = np.unique([query.category for query in queries], return_inverse=True)
    if len(names) == 1:
        return []
    return [
        Slice(name or "no category", np.flatnonzero(category_of == n))
        for n, name in enumerate(names.tolist())
    ]


def by_mention(queries: Sequence[Query]) -> list[Slice]:
    """Texts that mention a colour or a pattern, where there are enough, and the other texts; empty
    if there are not enough.
    """
    found = _mentions(queries)
    if not found:
        return []
    rest = set(range(len(queries))).difference(*(part.queries.tolist() for part in found))
    others = [Slice("other texts", np.array(sorted(rest), dtype=np.int64))] if rest else []
    return [*found, *others]


def _mentions(queries: Sequence[Query]) -> list[Slice]:
    texts = [" ".join(query.captions).lower() for query in queries]
    found = [
        Slice(f"mention {what}", np.flatnonzero([bool(words.search(text)) for text in texts]))
        for what, words in MENTIONS.items()
    ]
    return [part for part in found if FEWEST_MENTIONS <= len(part.queries) < len(queries)]


def _lengths(queries: Sequence[Query]) -> list[Slice]:
    words_Q = np.array([len(" ".join(query.captions).split()) for query in queries])
    shares = np.arange(1, PARTS) / PARTS
    ends = np.unique(np.quantile(words_Q, shares, method="lower")).tolist()
    # A last end that nothing lies beyond would leave an empty part.
    ends = [end for end in ends if end < words_Q.max()]
    if not ends:
        return []
    part_of = np.searchsorted(ends, words_Q)
    names = [f"up to {ends[0]} words"]
    names += [_span(low + 1, high) for low, high in pairwise(ends)]
    names.append(f"more than {ends[-1]} words")
    return [Slice(name, np.flatnonzero(part_of == n)) for n, name in enumerate(names)]


def _span(low: int, high: int) -> str:
    return f"{low} to {high} words" if low < high else f"{low} words"
