"""What is wrong with a CIRR test-server file: all of it, before the server refuses it."""

import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dafm_ray.datasets.base import Query
from dafm_ray.evaluation.submission_format import (
    HEAD,
    LENGTHS,
    TEST_QUERIES,
    VERSION,
    Fault,
    Pairs,
    UnreadableError,
    parse_content,
    read_content,
)

SHOWN = 5
"""Faults of one kind that are printed."""

_PAIR_ID = re.compile(r"\s*0*(0|[1-9][0-9]*)(\.0+)?\s*")
_SUFFIX = ".png"
_SPLIT_PREFIXES = frozenset({"train", "dev", "test1"})
"""What the names of a split begin with, up to the first `-`."""


@dataclass(frozen=True)
class SubmissionCheck:
    """A checked file.

    Attributes:
        metric: what the lists are for; empty if it cannot be told.
        queries: lists in the file.
        faults: everything that is wrong.
        notes: what is merely odd.
        unchecked: what could not be checked, and why.
    """

    metric: str
    queries: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """For people: the first faults of each kind, the number of the others, remarks."""
        if not self.faults:
            sound = "sound in form" if self.unchecked else "sound"
            yield f"{sound} ({self.metric}, {self.queries:,} queries)"
        kinds: defaultdict[str, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            kinds[fault.kind].append(fault)
        for kind, faults in kinds.items():
            yield from (fault.message for fault in faults[:SHOWN])
            if len(faults) > SHOWN:
                yield f"and {len(faults) - SHOWN:,} more: {kind}"
        yield from self.notes
        yield from (f"not checked: {what}" for what in self.unchecked)


def check_submission(
    file: Path,
    queries: Sequence[Query] | None = None,
    gallery_ids: Collection[str] | None = None,
) -> SubmissionCheck:
    """Check a file that anybody may have written; whatever it holds, nothing is raised.

    Args:
        file: `.json` or `.json.gz`.
        queries: of the split; None leaves out what needs them, and a note says so.
        gallery_ids: images of the split; None likewise.
    """
    try:
        content = read_content(file)
    except UnreadableError as error:
        return SubmissionCheck("", 0, (error.fault,))
    return check_content(content, queries, gallery_ids)


def check_content(
    content: bytes, queries: Sequence[Query] | None, gallery_ids: Collection[str] | None
) -> SubmissionCheck:
    """`check_submission` of what would be uploaded."""
    try:
        pairs, faults = parse_content(content)
    except UnreadableError as error:
        return SubmissionCheck("", 0, (error.fault,))
    split = _Split(
        None if queries is None else {query.id: query for query in queries},
        None if gallery_ids is None else frozenset(gallery_ids),
    )
    values = dict(pairs)
    lists = split.lists(values)
    metric = _metric_of(values, lists)
    faults += _repeated_keys(pairs)
    faults += _head_faults(values, metric)
    faults += split.key_faults(values)
    faults += split.missing(lists)
    for id, names in lists.items():
        faults += split.list_faults(metric, id, names)
    return SubmissionCheck(
        metric, len(lists), tuple(faults), tuple(_alike(lists)), tuple(split.unchecked())
    )


@dataclass(frozen=True)
class _Split:
    """What a file is held against; None is not known."""

    queries: Mapping[str, Query] | None
    gallery: frozenset[str] | None

    def unchecked(self) -> Iterator[str]:
        if self.queries is None:
            yield (
                "whether every query of the split has a list, without its reference and, for "
                "recall_subset, within its set; that takes the annotations"
            )
        if self.gallery is None:
            yield "whether the names are images of the split; that takes the annotations"

    def lists(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Pair id -> what stands for its list, also if the key is misspelt."""
        ids = {self._pair_id(key): names for key, names in values.items() if key not in HEAD}
        return {id: names for id, names in ids.items() if self._has(id)}

    def key_faults(self, values: Mapping[str, Any]) -> Iterator[Fault]:
        for key in values:
            id = self._pair_id(key)
            if key in HEAD:
                continue
            if not id:
                yield Fault("extra key", key, f"the key {key!r} is no pair id; take it out")
            elif not self._has(id):
                message = f"the split has no query {key!r}; take it out, or name its split"
                yield Fault("unknown pair id", key, message)
            elif id != key:
                message = f"the key {key!r} must be written {id!r}"
                yield Fault("misspelt pair id", key, message)

    def missing(self, lists: Mapping[str, Any]) -> Iterator[Fault]:
        if self.queries is None and len(lists) != TEST_QUERIES:
            message = (
                f"it holds {len(lists):,} lists, and test1 has {TEST_QUERIES:,} queries; name the "
                "annotations to see which ones lack a list"
            )
            yield Fault("wrong count", "", message)
        for id in self.queries or ():
            if id not in lists:
                message = f"query {id!r} has no list; every query of the split needs one"
                yield Fault("missing pair id", id, message)

    def list_faults(self, metric: str, id: str, names: Any) -> Iterator[Fault]:
        where = f"query {id!r}"
        if not isinstance(names, list):
            message = f"{where} has {reprlib.repr(names)}; it must be a list of names"
            yield Fault("not a list", id, message)
            return
        length = LENGTHS.get(metric, len(names))
        if not names:
            yield Fault("empty list", id, f"{where} has an empty list; name its best images")
        elif len(names) < length:
            message = f"{where} has {len(names)} names; add some, {metric} needs {length}"
            yield Fault("too short", id, message)
        elif len(names) > length:
            message = f"{where} has {len(names)} names; keep the first {length} for {metric}"
            yield Fault("too long", id, message)
        seen: set[str] = set()
        for name in names:
            plain = _plain(name) if isinstance(name, str) else ""
            if not plain:
                message = f"{where} lists {reprlib.repr(name)}; it must be the name of an image"
                yield Fault("not a name", id, message)
                continue
            if plain != name:
                message = f"{where} lists {name!r}; write {plain!r}"
                yield Fault(_misspelling(name), id, message)
            if plain in seen:
                message = f"{where} lists {plain!r} twice; keep the better place"
                yield Fault("repeated name", id, message)
            seen.add(plain)
            yield from self._misplaced(metric, id, plain)

    def _misplaced(self, metric: str, id: str, name: str) -> Iterator[Fault]:
        query = self.queries[id] if self.queries is not None else None
        where = f"query {id!r} lists {name!r}"
        if query is not None and name == query.reference:
            message = f"{where}, its own reference; take it out"
            yield Fault("reference in list", id, message)
        elif self.gallery is not None and name not in self.gallery:
            if name.partition("-")[0] in _SPLIT_PREFIXES - self._prefixes:
                message = f"{where}, an image of another split; rank the images of this one"
                yield Fault("name of another split", id, message)
            else:
                message = f"{where}, which is no image of the split; mend the name"
                yield Fault("unknown name", id, message)
        elif query is not None and metric == "recall_subset" and name not in query.group:
            message = f"{where}, which is not in its set; rank its set alone"
            yield Fault("name outside the set", id, message)

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(name.partition("-")[0] for name in self.gallery or ())

    def _pair_id(self, key: str) -> str:
        """The pair id that a key means; empty if it means none."""
        if self.queries is not None and key in self.queries:
            return key
        spelled = _PAIR_ID.fullmatch(key)
        return spelled[1] if spelled else ""

    def _has(self, id: str) -> bool:
        return bool(id) if self.queries is None else id in self.queries


def _metric_of(values: Mapping[str, Any], lists: Mapping[str, Any]) -> str:
    """The metric of the most frequent length, else the stated one; empty if there is neither."""
    lengths = Counter(len(names) for names in lists.values() if isinstance(names, list))
    usual = max(lengths, key=lambda length: lengths[length], default=0)
    for metric, length in LENGTHS.items():
        if usual == length:
            return metric
    return next((metric for metric in LENGTHS if metric == values.get("metric")), "")


def _head_faults(values: Mapping[str, Any], metric: str) -> Iterator[Fault]:
    version, stated = (reprlib.repr(values.get(key)) for key in HEAD)
    if "version" not in values:
        yield Fault("no version", "version", f'it has no version; add "version": "{VERSION}"')
    elif values["version"] != VERSION:
        message = f"its version is {version}; the server takes {VERSION!r}"
        yield Fault("other version", "version", message)
    known = " or ".join(f'"{name}" (lists of {length})' for name, length in LENGTHS.items())
    if "metric" not in values:
        yield Fault("no metric", "metric", f'it has no metric; add "metric": {known}')
    elif values["metric"] not in list(LENGTHS):
        yield Fault("unknown metric", "metric", f"its metric is {stated}; write {known}")
    elif values["metric"] != metric:
        message = f"its metric is {stated}, but its lists have {LENGTHS[metric]} names; mend one"
        yield Fault("metric against lists", "metric", message)


def _repeated_keys(pairs: Pairs) -> Iterator[Fault]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            message = f"the key {key!r} stands {times} times, all but one unseen; keep one"
            yield Fault("repeated key", key, message)


def _alike(lists: Mapping[str, Any]) -> Iterator[str]:
    names = [tuple(names) for names in lists.values() if _is_names(names)]
    same = max(Counter(names).values(), default=0)
    if same > max(1, len(lists) // 2):
        yield f"odd: {same:,} of {len(lists):,} queries have the same list; is the text used?"


def _is_names(names: Any) -> bool:
    listed = isinstance(names, list) and bool(names)
    return listed and all(isinstance(name, str) for name in names)


def _plain(name: str) -> str:
    """The name as the server knows it."""
    last = name.strip().rpartition("/")[2]
    return last[: -len(_SUFFIX)] if last.lower().endswith(_SUFFIX) else last


def _misspelling(name: str) -> str:
    if "/" in name:
        return "path for a name"
    return "name with .png" if _SUFFIX in name.lower() else "name with spaces"
