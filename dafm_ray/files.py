"""Local files that appear whole or not at all."""

import csv
import io
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
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


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table whole.

    Raises:
        MachineError: it cannot be written.
    """
    write_text(file, csv_text(header, rows))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as comma-separated values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def write_text(file: Path, text: str) -> None:
    """Write a file whole, in UTF-8.

    Raises:
        MachineError: it cannot be written.
    """
    with replacing(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
