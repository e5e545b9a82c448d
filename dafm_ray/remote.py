"""Filesystems behind URIs, and trying again what may pass.

pyarrow's own filesystems come first (S3, GCS, Azure, HDFS); a scheme that it does not know is
fsspec's, if its package is installed.
"""

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
from pyarrow import fs

from dafm_ray.errors import ConfigError, DafmError, MachineError
from dafm_ray.uris import shown

T = TypeVar("T")

PATIENT_TRIES = 8
"""Of a request that pyarrow tries again by itself, because it is not ours: Ray's, and reads in the
middle of a shard."""

OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
"""What pyarrow calls filesystems without folders, whose files appear when they are whole."""

_PASSING = re.compile(
    r"AWS Error (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|SLOW_DOWN|REQUEST_TIMEOUT"
    r"|NETWORK_CONNECTION)"
    r"|Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)"
    r"|curlCode: |ServerBusy|OperationTimedOut|InternalError"
)
_STATUS = re.compile(r"HTTP status (\d{3})")
_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|SIGNATURE_DOES_NOT_MATCH"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|AuthenticationFailed|AuthorizationFailure|EXPIRED_TOKEN"
    r"|HTTP status 40[13]"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|ContainerNotFound|bucket does not exist")


class PatientS3(fs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's S3 with a number of tries that is kept when Ray sends it to another process.

    Small objects are one request instead of three. A URI's own filesystem would ask every 0.2 s
    for 6 s, all processes in step.
    """

    def __init__(self, tries: int, options: dict[str, Any]) -> None:
        options = {**options, "allow_delayed_open": True}
        super().__init__(retry_strategy=fs.AwsStandardS3RetryStrategy(tries), **options)
        self.tries = tries

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.tries, super().__reduce__()[1][0])


def open_filesystem(uri: str, tries: int = PATIENT_TRIES) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI and the path on it.

    Args:
        uri: of a scheme that pyarrow or fsspec knows.
        tries: of a request to S3; other filesystems have their own.

    Raises:
        ConfigError: neither knows the scheme, a package is missing, or the URI is malformed.
        MachineError: its client cannot start, or the server does not answer.
    """
    try:
        # Of a bucket of Amazon's it asks for the region.
        filesystem, path = retried(lambda: fs.FileSystem.from_uri(uri), "open", uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, FileNotFoundError) as error:
        if "Unrecognized filesystem" not in str(error) and "without" not in str(error):
            raise _cannot_open(uri, error) from None
        filesystem, path = _open_fsspec(uri)
    if isinstance(filesystem, fs.S3FileSystem):
        filesystem = PatientS3(tries, filesystem.__reduce__()[1][0])
    return filesystem, path.rstrip("/")


def impatient(filesystem: fs.FileSystem) -> fs.FileSystem:
    """The same filesystem without tries of its own, for requests that are `retried`."""
    if isinstance(filesystem, PatientS3):
        return PatientS3(1, filesystem.__reduce__()[1][1])
    return filesystem


def _open_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise _cannot_open(uri, f"it needs a package that is not installed: {error}") from None
    except ValueError:
        scheme = uri.partition("://")[0]
        raise _cannot_open(
            uri,
            f"neither pyarrow nor fsspec knows the scheme {scheme!r}; use s3, gs, abfs, hdfs or "
            "file, or another that fsspec has a package for",
        ) from None
    except Exception as error:  # each filesystem has its own
        raise _cannot_open(uri, error) from None
    return fs.PyFileSystem(fs.FSSpecHandler(found)), str(path)


def _cannot_open(uri: str, reason: object) -> ConfigError:
    return ConfigError(f"cannot open the storage URI {shown(uri)}: {reason}")


@dataclass(frozen=True)
class Backoff:
    """How a request that may pass is tried again: later each time, by chance up to twice as late.

    Attributes:
        tries: in all.
        first_s: shortest wait after the first try, in seconds; it doubles every time.
        longest_s: longest wait before chance, in seconds.
        sleep: waits; tests have one of their own.
        chance: draws from [0, 1).
    """

    tries: int = 7
    first_s: float = 0.25
    longest_s: float = 4.0
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.Random().random  # the global one is the user's

    def wait(self, failed: int) -> None:
        """Wait after so many failed tries."""
        self.sleep(min(self.first_s * 2 ** (failed - 1), self.longest_s) * (1 + self.chance()))


BACKOFF = Backoff()


def retried(action: Callable[[], T], doing: str, where: str, backoff: Backoff | None = None) -> T:
    """Do something on a remote filesystem, again if it fails in a way that may pass.

    Args:
        action: what; it can be done twice.
        doing: what, as `read`, for messages.
        where: its place, for messages.
        backoff: how often and when.

    Raises:
        FileNotFoundError: there is no such file.
        MachineError: access denied, no such bucket, or failed at every try.
    """
    backoff = backoff or BACKOFF
    started = time.monotonic()
    for failed in range(1, backoff.tries + 1):
        try:
            return action()
        except (FileNotFoundError, DafmError):
            raise
        except Exception as error:
            if not may_pass(error):
                _refuse(error, doing, where)
            if failed == backoff.tries:
                last = str(error).rstrip(".")
                raise MachineError(
                    f"cannot {doing} {shown(where)}: it failed {failed} times within "
                    f"{time.monotonic() - started:.0f} s, the last time with: {last}. Start again "
                    "once the storage answers; finished work is kept"
                ) from error
        backoff.wait(failed)
    raise AssertionError


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: a busy or broken server, a timeout, a lost
    connection.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if found := _STATUS.search(str(error)):
        return int(found[1]) in _PASSING_STATUS
    # Clients of fsspec's filesystems: botocore, aiohttp, gcsfs.
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if status is not None and str(status).isdigit():
        return int(status) in _PASSING_STATUS
    if type(error).__module__.partition(".")[0] == "aiohttp":
        return True
    return isinstance(error, OSError) and bool(_PASSING.search(str(error)))


def failure(error: Exception, where: str, otherwise: DafmError) -> DafmError:
    """What a failed read of something else's means: the server's trouble, or `otherwise`."""
    if isinstance(error, OSError) and may_pass(error):
        return MachineError(
            f"cannot read {shown(where)}: {error}. Start again once the storage answers; finished "
            "work is kept"
        )
    return otherwise


def _refuse(error: Exception, doing: str, where: str) -> NoReturn:
    if not isinstance(error, OSError):
        raise error
    text = str(error)
    if isinstance(error, PermissionError) or _DENIED.search(text):
        reason = (
            "access denied; check the credentials (for S3: AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY, or a profile) and what they may do there ({text})"
        )
    elif _NO_BUCKET.search(text):
        reason = "there is no such bucket; create it, or mend the URI"
    else:
        reason = text
    raise MachineError(f"cannot {doing} {shown(where)}: {reason}") from error
