"""`dafm data check`: what is wrong, or merely odd, about a data set before anything runs on it.

On annotations alone: entries that cannot be understood, duplicate ids, images outside the gallery,
empty captions, groups without their reference or target, sizes against the published ones, images
shared between parts, and an order that leaks. With images: those that are missing or unreadable,
those that decoding changes, and identical pixels under two ids.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import PurePosixPath

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.annotations import MissingAnnotationsError
from dafm_ray.datasets.base import Draft, Finding, ImageSource, Query, title_of
from dafm_ray.datasets.inspection import Inspection, inspect_images
from dafm_ray.datasets.order import JUDGED, OrderLeak, order_leak
from dafm_ray.datasets.registry import (
    PLACES,
    Entry,
    dataset_entry,
    missing_folder,
    read_dataset,
)
from dafm_ray.datasets.shards import open_shards
from dafm_ray.datasets.sources import ImageFiles, leaves
from dafm_ray.errors import DataError
from dafm_ray.progress import progress

LEAK_P = 0.01
"""An order whose p-value is below is said to leak."""


@dataclass(frozen=True)
class Part:
    """One split, or one category of it.

    Attributes:
        images: candidates.
        queries: entries that could be read.
        labelled: queries with targets.
        leak: what positions alone find; None without labels.
    """

    split: str
    category: str
    protocol: str
    images: int
    queries: int
    labelled: int
    leak: OrderLeak | None


@dataclass(frozen=True)
class Check:
    """A finished check.

    Attributes:
        images_checked: distinct images that were decoded; 0 on annotations alone.
        images_per_second: over that time.
    """

    name: str
    parts: list[Part]
    findings: list[Finding]
    images_checked: int = 0
    images_per_second: float = 0.0

    @property
    def changes_metric(self) -> int:
        """Findings that would change a metric."""
        return sum(finding.changes_metric for finding in self.findings)


def check(config: DatasetConfig) -> Check:
    """Check a data set, every split and category of it that is not narrowed down.

    Images are checked where `root` or `images` says where they lie, or none are needed.

    Raises:
        ConfigError: no such data set, split or category.
        DataError: no part of it is there.
    """
    drafts, findings = _read(config)
    entry = dataset_entry(config.name)
    parts: list[Part] = []
    for draft in drafts:
        leak = order_leak([id for id, _ in draft.images], draft.queries)
        labelled = sum(bool(query.targets) for query in draft.queries)
        parts.append(
            Part(
                draft.split,
                draft.category,
                draft.protocol,
                len(draft.images),
                len(draft.queries),
                labelled,
                leak,
            )
        )
        findings += _named(draft, [*draft.contradictions(), *_oddities(draft, entry)])
        findings += _named(draft, _leaks(leak))
        findings += _named(draft, _sizes(draft, entry.published.get((draft.split, draft.category))))
    findings += _shared(drafts)
    if not dataset_entry(config.name).keys & PLACES or config.root or config.images:
        inspected = _Images()
        inspected.look_at(drafts)
        return Check(
            config.name,
            parts,
            findings + inspected.findings,
            inspected.checked,
            inspected.per_second,
        )
    return Check(config.name, parts, findings)


def _read(config: DatasetConfig) -> tuple[list[Draft], list[Finding]]:
    """Every part that is there, and a finding for each that cannot be read."""
    entry = dataset_entry(config.name)
    drafts: list[Draft] = []
    findings: list[Finding] = []
    shards = open_shards(config.images) if config.images else None
    for split in [config.split] if config.split else entry.splits:
        for category in [config.category] if config.category else entry.categories:
            try:
                part = replace(config, split=split, category=category)
                drafts.append(read_dataset(part, shards))
            except DataError as error:
                asked = bool(config.split) or not isinstance(error, MissingAnnotationsError)
                title = title_of("", split, category)
                findings.append(Finding("missing part", title, str(error), asked))
                continue
            if config.split:
                problems = (replace(p, changes_metric=True) for p in drafts[-1].problems)
                drafts[-1] = replace(drafts[-1], problems=tuple(problems))
    if not drafts:
        raise DataError(findings[0].detail)
    return drafts, findings


def _named(draft: Draft, findings: Sequence[Finding]) -> list[Finding]:
    """Findings with the part of the data set they are about."""
    title = title_of("", draft.split, draft.category)
    if draft.name == "folder":
        return list(findings)
    return [replace(finding, detail=f"{title}: {finding.detail}") for finding in findings]


def _oddities(draft: Draft, entry: Entry) -> Iterator[Finding]:
    key = (draft.split, draft.category)
    empty = [query for query in draft.queries if not all(c.strip() for c in query.captions)]
    for query in empty:
        count = sum(not caption.strip() for caption in query.captions)
        detail = f"{count} of the {len(query.captions)} captions of query {query.id!r} is empty"
        as_published = len(empty) == entry.empty_captions.get(key, 0)
        yield Finding("empty caption", query.id, detail, not as_published)
    for query in draft.queries:
        if query.reference in query.targets:
            detail = f"the reference of query {query.id!r} is its own target"
            yield Finding("reference is target", query.id, detail, draft.policy == "mask")
        yield from _group_oddities(query, entry.group_size)
    yield from _unlike(draft, entry)
    yield from _paths(draft)


def _unlike(draft: Draft, entry: Entry) -> Iterator[Finding]:
    """Labels and groups that some queries have and others lack, and queries that stand twice."""
    total = len(draft.queries)
    for what, lacking in (
        ("target", [query.id for query in draft.queries if not query.targets]),
        ("group", [query.id for query in draft.queries if not query.group]),
    ):
        expected = entry.published and what == "target" and draft.split not in entry.unlabelled
        if 0 < len(lacking) < total or (lacking and expected):
            detail = f"{len(lacking):,} of {total:,} queries have no {what} (first: {lacking[0]!r})"
            yield Finding(f"no {what}", "", detail, bool(expected) or what == "group")
    seen: dict[tuple[str, ...], str] = {}
    for query in draft.queries:
        content = (query.reference, *query.captions, "", *query.targets)
        first = seen.setdefault(content, query.id)
        if first != query.id:
            detail = f"query {query.id!r} says the same as {first!r}"
            yield Finding("repeated query", query.id, detail, changes_metric=False)


def _paths(draft: Draft) -> Iterator[Finding]:
    """Image paths that leave the root, and files that stand for several images."""
    if not isinstance(draft.source, ImageFiles):
        return
    seen: dict[str, str] = {}
    for id, locator in draft.images:
        path = PurePosixPath(locator)
        if leaves(locator):
            yield Finding("path leaves the root", id, f"{id}: the path {locator!r} leaves the root")
        first = seen.setdefault(str(path), id)
        if first != id:
            yield Finding("one file for two ids", id, f"{id} and {first} are one file, {locator}")


def _group_oddities(query: Query, size: int) -> Iterator[Finding]:
    if size and len(query.group) != size:
        detail = f"the group of query {query.id!r} has {len(query.group)} members, not {size}"
        yield Finding("group of another size", query.id, detail)
    if not query.group:
        return
    if query.reference not in query.group:
        detail = f"the group of query {query.id!r} does not hold its reference"
        yield Finding("group without reference", query.id, detail)
    if query.targets and not set(query.targets) & set(query.group):
        detail = f"the group of query {query.id!r} does not hold its target"
        yield Finding("group without target", query.id, detail)


def _leaks(leak: OrderLeak | None) -> list[Finding]:
    if leak is None or leak.p >= LEAK_P:
        return []
    detail = (
        f"the order of the files alone finds {leak.hits[JUDGED]:,} of {leak.queries:,} targets "
        f"among the first {JUDGED} (by chance {leak.chance:.1f}, p = {leak.p:.3f}); stores keep "
        "galleries in hash order, other tools may profit from it"
    )
    return [Finding("order leak", "", detail, changes_metric=False)]


def _sizes(draft: Draft, published: tuple[int, int] | None) -> list[Finding]:
    found = (len(draft.images), len(draft.queries))
    if published is None or draft.protocol.endswith("val-split") or found == published:
        return []
    if not draft.queries and found[0] == published[0]:
        return []
    detail = (
        f"{found[0]:,} images and {found[1]:,} queries, published are {published[0]:,} and "
        f"{published[1]:,}; numbers do not compare with published ones"
    )
    return [Finding("other size", "", detail)]


def _shared(drafts: Sequence[Draft]) -> list[Finding]:
    """Images that stand in several galleries."""
    galleries = {
        (draft.category or draft.split, draft.split): {id for id, _ in draft.images}
        for draft in drafts
    }
    unions: defaultdict[str, set[str]] = defaultdict(set)
    for (kind, _), ids in galleries.items():
        unions[kind] |= ids
    findings: list[Finding] = []
    listed = sum(len(ids) for ids in galleries.values())
    distinct = len(set().union(*galleries.values()))
    for one, other in combinations(unions, 2):
        both = len(unions[one] & unions[other])
        if both:
            detail = (
                f"{one} and {other} share {both:,} images: the lists have {listed:,} entries for "
                f"{distinct:,} images, so {listed - distinct:,} seem to be missing on a disk"
            )
            findings.append(Finding("shared images", f"{one}, {other}", detail, False))
    across = [
        (one, other, len(galleries[one] & galleries[other]))
        for one, other in combinations(galleries, 2)
        if one[1] != other[1] and galleries[one] & galleries[other]
    ]
    if across:
        pairs = ", ".join(f"{a[1]} {a[0]} and {b[1]} {b[0]} {n:,}" for a, b, n in across)
        detail = f"images of one split stand in another: {pairs}; they were seen in training"
        findings.append(Finding("images across splits", "", detail, False))
    return findings


@dataclass
class _Images:
    """Looks at the images of all parts; each is decoded once."""

    findings: list[Finding] = field(default_factory=list)
    checked: int = 0
    per_second: float = 0.0

    def look_at(self, drafts: Sequence[Draft]) -> None:
        """Decode every image and list what was found."""
        by_source: list[tuple[ImageSource, list[Draft]]] = []
        for draft in drafts:
            missing = missing_folder(draft)
            if missing is None:
                alike = [drafts for source, drafts in by_source if source == draft.source]
                if alike:
                    alike[0].append(draft)
                else:
                    by_source.append((draft.source, [draft]))
            else:
                detail = f"the image folder {missing} is missing; --root names its parent"
                self.findings += _named(draft, [Finding("missing image folder", "", detail)])
        started = time.monotonic()
        for source, of_source in by_source:
            found = self._decode(source, of_source)
            for draft in of_source:
                self._unusable(draft, found)
                self._twins(draft, found)
        if self.checked:
            self.per_second = self.checked / (time.monotonic() - started)

    def _decode(self, source: ImageSource, drafts: Sequence[Draft]) -> dict[str, Inspection]:
        locators = list(dict.fromkeys(place for draft in drafts for _, place in draft.images))
        wanted = set(locators)
        found: dict[str, Inspection] = {}
        with progress("images", len(locators), unit="image") as shown:
            for part in inspect_images(source, locators):
                mine = {one.locator: one for one in part if one.locator in wanted}
                found |= mine
                failed = sum(bool(one.reason) for one in mine.values())
                shown.advance(len(mine), failed)
        self.checked += len(found)
        return found

    def _unusable(self, draft: Draft, found: dict[str, Inspection]) -> None:
        named = Counter(id for query in draft.queries for id in {query.reference, *query.targets})
        findings: list[Finding] = []
        for id, locator in draft.images:
            one = found.get(locator, Inspection(locator, reason="no shard holds it"))
            if one.reason:
                detail = f"{id}: {one.reason}; {named[id]} queries name it"
                findings.append(Finding("unusable image", id, detail))
            for odd in one.odd:
                findings.append(Finding("converted image", id, f"{id}: {odd}", False))
        self.findings += _named(draft, findings)

    def _twins(self, draft: Draft, found: dict[str, Inspection]) -> None:
        alike: defaultdict[bytes, list[str]] = defaultdict(list)
        for id, locator in draft.images:
            one = found.get(locator)
            if one is not None and one.pixels:
                alike[one.pixels].append(id)
        groups = [ids for ids in alike.values() if len(ids) > 1]
        group_of = {id: n for n, ids in enumerate(groups) for id in ids}
        touched: Counter[int] = Counter()
        for query in draft.queries:
            touched.update({group_of[id] for id in _undecided(query, draft, groups, group_of)})
        findings = [
            Finding(
                "identical pixels",
                ids[0],
                f"{', '.join(ids)} have the same pixels; {touched[n] or 'no'} queries have one of "
                "them as target or reference and count another as wrong",
                changes_metric=bool(touched[n]),
            )
            for n, ids in enumerate(groups)
        ]
        self.findings += _named(draft, findings)


def _undecided(
    query: Query, draft: Draft, groups: Sequence[Sequence[str]], group_of: dict[str, int]
) -> Iterator[str]:
    """Targets and references with a twin that the query treats differently."""
    for ids, handled in ((query.targets, query.targets), ((query.reference,), query.excluded)):
        if draft.policy == "keep" and ids == (query.reference,):
            continue
        for id in ids:
            if id in group_of and not set(groups[group_of[id]]) <= set(handled):
                yield id
