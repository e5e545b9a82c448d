"""What a study found, before it is written: sentences, tables, figures."""

from dataclasses import dataclass

from dafm_ray.files import write_csv as write_csv
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
