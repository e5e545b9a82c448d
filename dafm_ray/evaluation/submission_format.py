"""CIRR test-server files: what they look like, and reading those of others.

One JSON object for each metric, at most `LARGEST` bytes:

    {"version": "rc2", "metric": "recall" | "recall_subset", "PAIRID": [names, best first], ...}

Every query of the split has a list of `LENGTHS[metric]` different images, named without `.png`,
its reference not among them; for `recall_subset` they are members of the query's set.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "rc2"
HEAD = ("version", "metric")
"""Keys that are no pair ids."""

LENGTHS = {"recall": 50, "recall_subset": 3}
"""Metric -> names a query."""

SERVED, TEST_QUERIES = "test1", 4_148
"""The split that the server ranks, and its queries."""

LARGEST = 5_000_000
"""Bytes of a file that the server takes."""

_READ = 10 * LARGEST
"""Bytes that are looked into; what is longer was never meant for the server."""

_MARK = "\ufeff"

Pairs = tuple[tuple[str, Any], ...]
"""Keys and values of an object; a key that stands twice is there twice."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a file.

    Attributes:
        kind: what was looked for, as `repeated name`.
        place: the pair id or key; empty for the whole file.
        message: what is wrong, where, and how to mend it.
    """

    kind: str
    place: str
    message: str


class UnreadableError(Exception):
    """A fault behind which nothing else can be seen."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.fault = Fault(kind, "", message)


def submission_text(metric: str, lists: Mapping[str, Sequence[str]]) -> str:
    """A server file.

    Args:
        metric: a key of `LENGTHS`.
        lists: pair id -> names, best first.
    """
    return json.dumps({"version": VERSION, "metric": metric, **lists})


def read_content(file: Path) -> bytes:
    """What a file holds, unpacked if its name ends in `.gz`.

    Raises:
        UnreadableError: it cannot be read, or is far too long.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            content: bytes = stream.read(_READ + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        message = f"it cannot be unpacked ({error}); pack or copy it again"
        raise UnreadableError("damaged gzip", message) from None
    except OSError as error:
        message = f"it cannot be read ({error.strerror}); name a file"
        raise UnreadableError("unreadable file", message) from None
    if len(content) > _READ:
        raise UnreadableError("too large", _too_large(f"more than {_READ:,}"))
    return content


def parse_content(content: bytes) -> tuple[Pairs, list[Fault]]:
    """The object of a file, and what is wrong with the file around it.

    Raises:
        UnreadableError: it is not text, not JSON, or something else than an object.
    """
    faults: list[Fault] = []
    if len(content) > LARGEST:
        faults.append(Fault("too large", "", _too_large(f"{len(content):,}")))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        message = f"it is not UTF-8 text (byte {error.start}); save it as UTF-8"
        raise UnreadableError("not UTF-8", message) from None
    if text.startswith(_MARK):
        message = "it begins with a byte order mark; save it without one"
        faults.append(Fault("byte order mark", "", message))
    return _parse(text.removeprefix(_MARK)), faults


def _parse(text: str) -> Pairs:
    try:
        # Every object becomes a tuple of pairs, so that no pair hides another; lists stay lists.
        value = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and _ends_early(text, error):
            message = f"it ends in the middle, in line {error.lineno}; write or copy it again"
            raise UnreadableError("truncated", message) from None
        message = f"it is not JSON ({error}); write it again"
        raise UnreadableError("not JSON", message) from None
    if not isinstance(value, tuple):
        message = "it must hold one object: version, metric and a list for every pair id"
        raise UnreadableError("not an object", message)
    return value


def _ends_early(text: str, error: json.JSONDecodeError) -> bool:
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _too_large(size: str) -> str:
    return (
        f"it has {size} bytes, the server takes {LARGEST:,}; indent nothing, cut what is too long"
    )
