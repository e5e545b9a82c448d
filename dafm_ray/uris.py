"""Places by name: paths of this machine and URIs of others. Opens nothing."""

import re
from pathlib import Path

FILE_SCHEME = "file://"
_CREDENTIALS = re.compile(r"(?<=://)[^/@?]*@")


def is_uri(where: str) -> bool:
    """Whether a place is not on this machine: `s3://bucket/x`, but not `runs/x` or `file:///x`."""
    return "://" in where and not where.startswith(FILE_SCHEME)


def local_path(where: str) -> Path:
    """A place on this machine as a path."""
    return Path(where.removeprefix(FILE_SCHEME))


def join(where: str, name: str) -> str:
    """A place below another; the options of a URI stay at its end."""
    if not is_uri(where):
        return str(local_path(where) / name)
    place, mark, options = where.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def above(where: str) -> str:
    """The place that a file or folder lies in."""
    if not is_uri(where):
        return str(local_path(where).parent)
    place, mark, options = where.partition("?")
    return f"{place.rstrip('/').rpartition('/')[0]}{mark}{options}"


def last_part(where: str) -> str:
    """What a file or folder is called."""
    return Path(where.partition("?")[0] if is_uri(where) else where).name


def shown(where: str) -> str:
    """A place for messages: without the credentials that a URI may hold."""
    return _CREDENTIALS.sub("", where)
