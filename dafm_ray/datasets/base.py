"""The Dataset contract: a gallery in hash order, queries, and the policy for the reference.

The order in which a data set lists its images leaks: in CIRR a target tends to follow its
reference, so a stable sort over ties, or any filter along the gallery axis, would profit from it.
Galleries are therefore kept in hash order, and the order of the source is kept apart.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from dafm_ray.errors import DataError
from dafm_ray.uris import shown

ReferencePolicy = Literal["mask", "keep"]

PROTOCOLS: dict[str, ReferencePolicy | None] = {
    "cirr": "mask",
    "fashioniq": "keep",
    "fashioniq-val-split": "keep",
    "folder": None,
}
"""Labels of the evaluation protocols and the policy each prescribes, if it does;
`evaluation.protocols` says which numbers each has."""


class ImageSource(Protocol):
    """Opens images by locator. Instances are small and picklable: they travel to the workers."""

    def open(self, locator: str) -> Image.Image:
        """Return the decoded image in its stored colour mode.

        Raises:
            ImageError: the image is missing or cannot be decoded; the message is the reason.
        """
        ...


@dataclass(frozen=True)
class Query:
    """One composed query: a reference image and a modification text.

    Attributes:
        id: unique within the data set, independent of the order of the source.
        reference: gallery id of the reference image.
        captions: the modification texts; joining them is the sub-model's business.
        targets: gallery ids of the relevant candidates (empty where unknown); retrieving any of
            them in the first K is a hit at K.
        excluded: candidates taken out of this query's ranking. Under the `mask` policy the
            reference and every picture that cannot be told from it.
        group: the subset for Rsubset@K, reference and target among them; empty if there is none.
        fold_group: queries with the same value never stand on both sides of a split.
        category: for macro means and error analysis.
    """

    id: str
    reference: str
    captions: tuple[str, ...]
    targets: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    fold_group: str = ""
    category: str = ""


def hash_key(id: str) -> tuple[bytes, str]:
    """Sort key of the hash order: ascending blake2b(id as UTF-8, 16 bytes), then the id."""
    return hashlib.blake2b(id.encode(), digest_size=16).digest(), id


def digest(parts: Iterable[str]) -> str:
    """Hex digest of a sequence of strings that no two different sequences share."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode()
        hasher.update(len(encoded).to_bytes(8, "little"))
        hasher.update(encoded)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Gallery:
    """Candidate images in hash order.

    Attributes:
        ids: (N,) ids, ascending in `hash_key`.
        source_order: (N,) position of each id in the source, for audits and nothing else.
        locators: (N,) what an `ImageSource` opens.
    """

    ids: tuple[str, ...]
    source_order: tuple[int, ...]
    locators: tuple[str, ...]
    _position: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_position", {id: n for n, id in enumerate(self.ids)})

    @staticmethod
    def from_source(locators: Mapping[str, str]) -> "Gallery":
        """Gallery of `{id: locator}`, listed in the order of the source."""
        listed = sorted(((hash_key(id), n, id) for n, id in enumerate(locators)))
        ids = tuple(id for _, _, id in listed)
        return Gallery(ids, tuple(n for _, n, _ in listed), tuple(locators[id] for id in ids))

    def __len__(self) -> int:
        return len(self.ids)

    def position(self, id: str) -> int:
        """Position of an id in hash order; KeyError if it is not in the gallery."""
        return self._position[id]

    @property
    def digest(self) -> str:
        """Digest of the ids in hash order: equal for every order of the source."""
        return digest(self.ids)


@dataclass(frozen=True)
class Finding:
    """Something about a data set that its user should know.

    Attributes:
        check: what was looked for, as `duplicate id`.
        item: the query or image it is about.
        detail: what is wrong and, where it can be mended, how.
        changes_metric: whether a number would come out differently once it is mended.
    """

    check: str
    item: str
    detail: str
    changes_metric: bool = True


@dataclass(frozen=True)
class Dataset:
    """A gallery, queries over it and the protocol that makes their numbers comparable.

    Attributes:
        protocol: name of the evaluation protocol, a row of `evaluation.protocols`.
        category: of all its queries, where a data set comes in categories.

    Queries are kept in the hash order of (reference, id), so that queries which share a reference
    stand together and it is decoded once.

    Raises:
        DataError: no image or no query, an id twice, or a query that names an unknown image.
    """

    name: str
    split: str
    protocol: str
    policy: ReferencePolicy
    gallery: Gallery
    queries: tuple[Query, ...]
    source: ImageSource
    category: str = ""

    def __post_init__(self) -> None:
        where = title_of(self.name, self.split, self.category)
        if not len(self.gallery) or not self.queries:
            raise DataError(
                f"{where} has {len(self.gallery)} images and {len(self.queries)} queries; "
                "both are needed"
            )
        ordered = sorted(self.queries, key=lambda q: (hash_key(q.reference), hash_key(q.id)))
        object.__setattr__(self, "queries", tuple(ordered))
        for finding in contradictions(self.gallery.ids, ordered):
            raise DataError(f"{where}: {finding.detail}")

    @property
    def queries_digest(self) -> str:
        """Digest of everything that defines the queries and their labels."""
        return digest(repr(query) for query in self.queries)


@dataclass(frozen=True)
class Draft:
    """What the files of a data set say, before it is known to fit together.

    Attributes:
        images: (id, locator) in the order of the source.
        queries: in any order.
        problems: entries of the files that cannot be understood.
    """

    name: str
    split: str
    protocol: str
    policy: ReferencePolicy
    images: tuple[tuple[str, str], ...]
    queries: tuple[Query, ...]
    source: ImageSource
    category: str = ""
    problems: tuple[Finding, ...] = ()

    @property
    def title(self) -> str:
        """Name, split and category, as `fashioniq val dress`."""
        return title_of(self.name, self.split, self.category)

    def contradictions(self) -> Iterator[Finding]:
        """Everything that keeps this from being a data set, entry by entry."""
        yield from self.problems
        yield from contradictions([id for id, _ in self.images], self.queries)

    def dataset(self) -> Dataset:
        """The data set.

        Raises:
            DataError: the first contradiction.
        """
        for problem in self.problems:
            raise DataError(problem.detail)
        refuse_duplicates([id for id, _ in self.images], f"{self.title}: image")
        return Dataset(
            name=self.name,
            split=self.split,
            protocol=self.protocol,
            policy=self.policy,
            gallery=Gallery.from_source(dict(self.images)),
            queries=self.queries,
            source=self.source,
            category=self.category,
        )


def title_of(name: str, split: str, category: str) -> str:
    """What a data set is called in tables and messages."""
    return " ".join(part for part in (name, split, category) if part)


def label_of(name: str, split: str, category: str, root: str) -> str:
    """The title, and the root of an own folder, because all of these are called alike."""
    return title_of(name, split, category) + (f" {shown(root)}" if name == "folder" else "")


def contradictions(images: Sequence[str], queries: Sequence[Query]) -> Iterator[Finding]:
    """Ids that stand twice, and queries that name images which are not in the gallery."""
    yield from _repeated(images, "image")
    yield from _repeated([query.id for query in queries], "query id")
    known = set(images)
    for query in queries:
        for what in ("targets", "group"):
            yield from _repeated(getattr(query, what), f"{what} of query {query.id!r}:")
        named = (("reference", [query.reference]), ("target", query.targets))
        others = [id for id in query.excluded if id != query.reference]
        for what, ids in (*named, ("excluded image", others), ("group", query.group)):
            for id in ids:
                if id not in known:
                    yield Finding(
                        f"{what} outside the gallery",
                        query.id,
                        f"query {query.id!r} names {id!r}, which is not in the gallery; "
                        "add the image or drop the query",
                    )


def _repeated(ids: Sequence[str], what: str) -> Iterator[Finding]:
    if len(set(ids)) == len(ids):
        return
    for id, count in Counter(ids).items():
        if count > 1:
            times = "twice" if count == 2 else f"{count} times"
            detail = f"{what} {id!r} stands {times}; ids must be unique"
            yield Finding("duplicate id", id, detail)


def refuse_duplicates(ids: Sequence[str], what: str) -> None:
    """DataError that names the first id that stands twice."""
    for finding in _repeated(ids, what):
        raise DataError(finding.detail)


def exclude_reference(
    reference: str, policy: ReferencePolicy, twins: Sequence[str] = ()
) -> tuple[str, ...]:
    """Candidates a policy takes out of the ranking: none, or the reference and its twins."""
    return (reference, *twins) if policy == "mask" else ()
