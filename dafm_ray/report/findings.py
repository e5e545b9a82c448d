"""What a study found, before it is written: sentences, tables, figures."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dafm_ray.report.figures import Figure


@dataclass(frozen=True)
class Section:
    """A table of the page, with its title and what it is of; `words` leading columns hold words."""

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Findings:
    """The parts of a study's page."""

    notes: list[str]
    sections: list[Section]
    figures: list[Figure]


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
