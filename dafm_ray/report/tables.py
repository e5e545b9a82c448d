"""The result table as data, Markdown, CSV and LaTeX."""

import csv
import io
from dataclasses import dataclass

from dafm_ray.evaluation.overlap import Overlap
from dafm_ray.evaluation.significance import Paired
from dafm_ray.markdown import markdown_table

_WORDS = 3
"""Leading columns that hold words: system, kind, protocol."""


@dataclass(frozen=True)
class Row:
    """One system in the table.

    Attributes:
        metrics: metric -> percent.
        ci95: metric -> 95 % interval in percent.
        hits, hits_best, hits_worst, hits_expected: column -> count, by the luck of ties.
        vs: other system -> comparison.
    """

    name: str
    kind: str
    queries: int
    metrics: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    hits: dict[str, int | float]
    hits_best: dict[str, int | float]
    hits_worst: dict[str, int | float]
    hits_expected: dict[str, int | float]
    vs: dict[str, Paired]


@dataclass(frozen=True)
class Table:
    """All systems under one protocol.

    Attributes:
        caption: data set, protocol and sizes, printed with every form of the table.
        protocol: printed in every row.
        rows: in the order they are shown.
        baseline: the system the win/tie/loss column compares with.
        overlap: of the single systems' hits.
    """

    caption: str
    protocol: str
    rows: tuple[Row, ...]
    baseline: str
    overlap: Overlap

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metric columns."""
        return tuple(self.rows[0].metrics)

    def best(self, metric: str) -> float:
        """Highest percent of a metric, as printed."""
        return max(round(row.metrics[metric], 2) for row in self.rows)

    def comparison(self, row: Row) -> str:
        """`win/tie/loss` against the baseline; a dash for the baseline itself."""
        paired = row.vs.get(self.baseline)
        return f"{paired.win}/{paired.tie}/{paired.loss}" if paired else "-"

    def header(self) -> list[str]:
        """Column titles."""
        return ["system", "kind", "protocol", *self.metrics, f"win/tie/loss vs {self.baseline}"]

    def cells(self) -> list[list[str]]:
        """Rows of text, percents with two decimals."""
        return [
            [
                row.name,
                row.kind,
                self.protocol,
                *(f"{row.metrics[metric]:.2f}" for metric in self.metrics),
                self.comparison(row),
            ]
            for row in self.rows
        ]


def to_markdown(table: Table) -> str:
    """Aligned Markdown with the caption below."""
    rows = markdown_table(table.header(), table.cells(), _WORDS)
    return f"{rows}\n\n{table.caption}\n"


def to_csv(table: Table) -> str:
    """Percents, hit counts and the protocol, one system a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(table.rows[0].hits)
    hits = [f"hits {column}" for column in columns]
    writer.writerow([*table.header(), "queries", *hits, "caption"])
    for row, cells in zip(table.rows, table.cells(), strict=True):
        counts = [row.hits[column] for column in columns]
        writer.writerow([*cells, row.queries, *counts, table.caption])
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs table; the best of each column is bold."""
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{'l' * _WORDS}{'r' * len(table.metrics)}r}}",
        r"\toprule",
        " & ".join(_latex(title) for title in table.header()) + r" \\",
        r"\midrule",
    ]
    for row, cells in zip(table.rows, table.cells(), strict=True):
        numbers = [
            rf"\textbf{{{cell}}}" if round(row.metrics[metric], 2) == table.best(metric) else cell
            for metric, cell in zip(table.metrics, cells[_WORDS:-1], strict=True)
        ]
        lines.append(" & ".join([*map(_latex, cells[:_WORDS]), *numbers, cells[-1]]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _latex(text: str) -> str:
    for plain in "&%$#_{}":
        text = text.replace(plain, f"\\{plain}")
    return text
