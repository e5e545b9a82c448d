"""What a study found, before it is written: sentences, tables, figures."""

from dataclasses import dataclass
from pathlib import Path

from dafm_ray.evaluation.significance import Paired
from dafm_ray.files import write_csv
from dafm_ray.report.figures import Figure

Cells = tuple[str | Paired, ...]


@dataclass(frozen=True)
class Section:
    """A table of the page.

    Attributes:
        title: of the table.
        text: what it is of.
        header: column titles.
        rows: text, or a difference.
        words: leading columns that hold words.
        differences: titles of the columns that hold differences, or a dash where there is none.
    """

    title: str
    text: str
    header: tuple[str, ...]
    rows: tuple[Cells, ...]
    words: int = 1
    differences: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[tuple[str, ...], ...]:
        """The rows as people read them."""
        return tuple(
            tuple(points(cell) if isinstance(cell, Paired) else cell for cell in row)
            for row in self.rows
        )

    def write_csv(self, file: Path) -> None:
        """Write the table with a difference, its interval and its verdict in columns of their own;
        empty where there is none.
        """
        columns = [
            [title, f"{title} low", f"{title} high", f"{title} significant"]
            if title in self.differences
            else [title]
            for title in self.header
        ]
        rows = [
            [
                text
                for cell, titles in zip(row, columns, strict=True)
                for text in (_numbers(cell) if len(titles) > 1 else [str(cell)])
            ]
            for row in self.rows
        ]
        write_csv(file, [title for titles in columns for title in titles], rows)


@dataclass(frozen=True)
class Findings:
    """The parts of a study's page."""

    notes: list[str]
    sections: list[Section]
    figures: list[Figure]


def points(paired: Paired) -> str:
    """A difference with its interval, and a star if it stands after the correction."""
    low, high = paired.ci95
    star = " *" if paired.is_significant else ""
    return f"{paired.diff:+.2f} [{low:+.2f}, {high:+.2f}]{star}"


def _numbers(cell: str | Paired) -> list[str]:
    if isinstance(cell, str):
        return [""] * 4
    verdict = "true" if cell.is_significant else "false"
    return [*(f"{value:.2f}" for value in (cell.diff, *cell.ci95)), verdict]
