"""Errors a user can mend.

Every message says what is wrong, where, and how to mend it. The command line prints the message
without a traceback and ends with the class's exit code.
"""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class DafmError(Exception):
    """A failure a user can understand; base of all errors this package raises on purpose."""

    exit_code = 1


class ConfigError(DafmError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(DafmError):
    """Wrong or unusable data: images, annotations, checkpoints, a corrupt store."""

    exit_code = 3


class MachineError(DafmError):
    """The machine refused: disk full, no permission, another writer holds the store."""

    exit_code = 5


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """Message about a name that does not exist: the nearest one and all known ones."""
    names = list(known)
    near = get_close_matches(given, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"there is no {what} {given!r}{hint} Known: {', '.join(names)}"


DONE = 0
DONE_WITH_FAILURES = 4
"""Exit code of a run that finished although some items were quarantined or failed."""

_REFUSALS = {
    errno.ENOSPC: "the disk is full; free some space and start again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and start again",
    errno.EACCES: "permission denied; check who owns the folder",
    errno.EPERM: "permission denied; check who owns the folder",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
    errno.EISDIR: "a folder of that name is in the way; choose another name",
    errno.ENOTDIR: "a file of that name is in the way; choose another folder",
    errno.ENOENT: "there is no such folder and it cannot be made",
    errno.EROFS: "the file system is read-only; choose another place",
}


@contextmanager
def refusals(where: object) -> Iterator[None]:
    """Turn what the machine refuses into a `MachineError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REFUSALS.get(error.errno or 0)
        if reason is None:
            raise
        raise MachineError(f"cannot write {where}: {reason}") from error
