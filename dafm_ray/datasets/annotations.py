"""Reading annotation files: every entry is checked, and what is wrong names its file and entry."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any, TypeVar

from dafm_ray.config import DatasetConfig
from dafm_ray.datasets.base import Finding, Query
from dafm_ray.errors import ConfigError, DataError
from dafm_ray.storage import Storage, open_storage
from dafm_ray.uris import join, shown

Value = TypeVar("Value")

MISSING = "missing annotations"
"""Check of a split whose queries are not there."""


class MissingAnnotationsError(DataError):
    """A part of a data set that is not there at all."""


_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def annotations_below(config: DatasetConfig, below: str, file: str) -> Storage:
    """The folder that holds an annotation file: the one named, or the root, or `below` in it.

    Raises:
        ConfigError: no folder is named.
        DataError: none of them holds it.
        MachineError: there is no such bucket, or its server refuses or does not answer.
    """
    named = config.annotations or config.root
    if not named:
        raise ConfigError("set dataset.root to the folder of images, or dataset.annotations")
    for place in (named, join(named, below)):
        folder = open_storage(place)
        if folder.has_folder("") and folder.exists(file):
            return folder
    raise MissingAnnotationsError(
        f"there is no {file} in {shown(named)}; set dataset.annotations to the folder that holds "
        "captions/ and image_splits/"
    )


def place_of(folder: Storage, file: str) -> str:
    """Where a file lies, for messages."""
    return shown(str(folder.place(file)))


def read_json(folder: Storage, file: str, kind: type[Value]) -> Value:
    """A JSON file whose outermost value is a `kind`.

    Raises:
        DataError: it cannot be read, is not JSON, is something else, or repeats a key.
        MachineError: its server refuses or does not answer.
    """
    where = place_of(folder, file)
    value = parse_json(read_text(folder, file), where)
    if not isinstance(value, kind):
        raise DataError(f"{where} must hold {_KINDS[kind]}")
    return value


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: it is not JSON, an object repeats a key, or a text is not Unicode.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unrepeated)
        # Only an escape can stand for what UTF-8 cannot hold.
        spelled = json.dumps(value, ensure_ascii=False) if "\\ud" in text.lower() else ""
    except _RepeatedKeyError as error:
        raise DataError(f"{where}: the key {error.args[0]!r} stands twice") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not is_text(spelled):
        raise DataError(f"{where} holds characters that are not Unicode text")
    return value


def read_text(folder: Storage, file: str) -> str:
    """A UTF-8 file, with or without a byte order mark; every end of a line is `\\n`.

    Raises:
        DataError: it is missing, cannot be read, or is not UTF-8.
        MachineError: its server refuses or does not answer.
    """
    where = place_of(folder, file)
    try:
        return io.TextIOWrapper(io.BytesIO(folder.read(file)), encoding="utf-8-sig").read()
    except FileNotFoundError:
        raise DataError(f"there is no file {where}") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(f"{where} cannot be read: {reason}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 (byte {error.start}); convert it") from None


def take(entry: Any, key: str, kind: type[Value], where: str) -> Value:
    """A value of an entry.

    Raises:
        DataError: the entry is no object, or the value is missing, empty or of another type.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object")
    if key not in entry:
        raise DataError(f"{where}: {key!r} is missing")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise DataError(f"{where}: {key!r} must be {_KINDS[kind]}, found {value!r}")
    return value


def texts(values: Any, what: str, where: str) -> tuple[str, ...]:
    """A list of strings as a tuple.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: {what!r} must be a list of strings")
    return tuple(values)


def read_queries(
    entries: Iterable[tuple[str, Any]], build: Callable[[Any, str], Query]
) -> tuple[tuple[Query, ...], tuple[Finding, ...]]:
    """Build a query from each entry; entries that cannot be understood are listed.

    Args:
        entries: (where it stands, entry).
        build: raises DataError.
    """
    queries: list[Query] = []
    problems: list[Finding] = []
    for where, entry in entries:
        try:
            query = build(entry, where)
            if not is_text(_all_text(query)):
                raise DataError(f"{where} holds characters that are not Unicode text")
            queries.append(query)
        except DataError as error:
            problems.append(Finding("unreadable entry", where, str(error)))
    return tuple(queries), tuple(problems)


def read_entries(
    folder: Storage, file: str, build: Callable[[Any, str], Query]
) -> tuple[tuple[Query, ...], tuple[Finding, ...]]:
    """`read_queries` of a JSON list; a file that is not there is one problem."""
    where = place_of(folder, file)
    if not folder.exists(file):
        detail = f"there is no file {where}, so there are no queries"
        return (), (Finding(MISSING, PurePosixPath(file).name, detail, changes_metric=False),)
    entries = enumerate(read_json(folder, file, list))
    return read_queries(((f"{where}, entry {n}", entry) for n, entry in entries), build)


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8; names of odd files and lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _all_text(query: Query) -> str:
    lists = (query.captions, query.targets, query.group, query.excluded)
    single = (query.id, query.reference, query.category, query.fold_group)
    return "\0".join((*single, *(text for row in lists for text in row)))


class _RepeatedKeyError(Exception):
    pass


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKeyError(counts.most_common(1)[0][0])
    return values
