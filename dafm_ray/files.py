"""Local files that appear whole or not at all."""

import csv
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dafm_ray.errors import refusals


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file that takes the name of `file` when it is whole.

    Raises:
        MachineError: the file cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    with refusals(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table whole.

    Raises:
        MachineError: it cannot be written.
    """
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_text(file: Path, text: str) -> None:
    """Write a file whole, in UTF-8.

    Raises:
        MachineError: it cannot be written.
    """
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
