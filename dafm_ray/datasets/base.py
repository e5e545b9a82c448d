"""The Dataset contract: a gallery in hash order, queries, and the policy for the reference.

The order in which a data set lists its images leaks: in CIRR a target tends to follow its
reference, so a stable sort over ties, or any filter along the gallery axis, would profit from it.
Galleries are therefore kept in hash order, and the order of the source is kept apart.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from dafm_ray.errors import DataError

ReferencePolicy = Literal["mask", "keep"]


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
class Dataset:
    """A gallery, queries over it and the protocol that makes their numbers comparable.

    Attributes:
        protocol: name of the evaluation protocol: `cirr` (reference masked, subset recall) or
            `folder`.

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

    def __post_init__(self) -> None:
        where = f"{self.name}:{self.split}"
        if not len(self.gallery) or not self.queries:
            raise DataError(
                f"{where} has {len(self.gallery)} images and {len(self.queries)} queries; "
                "both are needed"
            )
        ordered = sorted(self.queries, key=lambda q: (hash_key(q.reference), hash_key(q.id)))
        object.__setattr__(self, "queries", tuple(ordered))
        refuse_duplicates((q.id for q in ordered), f"{where}: query id")
        known = set(self.gallery.ids)
        for query in ordered:
            for what in ("targets", "group"):
                refuse_duplicates(getattr(query, what), f"{where}: {what} of query {query.id!r}:")
            unknown = [
                id
                for id in (query.reference, *query.targets, *query.excluded, *query.group)
                if id not in known
            ]
            if unknown:
                raise DataError(
                    f"{where}: query {query.id!r} names {unknown[0]!r}, which is not in the "
                    "gallery; add the image or drop the query"
                )

    @property
    def queries_digest(self) -> str:
        """Digest of everything that defines the queries and their labels."""
        return digest(repr(query) for query in self.queries)


def refuse_duplicates(ids: Iterable[str], what: str) -> None:
    """DataError that names the first id that stands twice."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise DataError(f"{what} {id!r} stands twice; ids must be unique")
        seen.add(id)


def exclude_reference(
    reference: str, policy: ReferencePolicy, twins: Sequence[str] = ()
) -> tuple[str, ...]:
    """Candidates a policy takes out of the ranking: none, or the reference and its twins."""
    return (reference, *twins) if policy == "mask" else ()
