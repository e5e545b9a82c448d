"""Errors a user can mend.

Every message says what is wrong, where, and how to mend it. The command line prints the message
without a traceback and ends with the class's exit code.
"""


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


DONE = 0
DONE_WITH_FAILURES = 4
"""Exit code of a run that finished although some items were quarantined or failed."""
