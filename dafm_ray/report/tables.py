"""The result table as data, Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dafm_ray.evaluation.overlap import Overlap
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.evaluation.significance import Paired
from dafm_ray.markdown import markdown_table
from dafm_ray.report.published import Published

_WORDS = 3
"""Leading columns that hold words: system, kind, protocol."""

MARKS = ("†", "‡")
"""Of a cell: significantly above the best single system; above the best static one."""

_LATEX_MARKS = {"†": r"\dagger", "‡": r"\ddagger"}
ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One system in the table.

    Attributes:
        metrics: metric -> percent.
        ci95: metric -> 95 % interval in percent.
        hits, hits_best, hits_worst, hits_expected: column -> count, by the luck of ties.
        paired: other system -> metric -> comparison.
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
    paired: dict[str, dict[str, Paired]]

    @property
    def vs(self) -> dict[str, Paired]:
        """Other system -> comparison at the headline metric."""
        return {name: metrics[HEADLINE] for name, metrics in self.paired.items()}


@dataclass(frozen=True)
class Table:
    """All systems under one protocol.

    Attributes:
        caption: data set, protocol and sizes, printed with every form of the table.
        protocol: printed in every row.
        rows: in the order they are shown; oracles last.
        single: the best single system, which the win/tie/loss column compares with.
        static: the best static system; empty if there is none.
        overlap: of the single systems' hits.
        published: rows of papers on this data set, if there are any.
    """

    caption: str
    protocol: str
    rows: tuple[Row, ...]
    single: str
    static: str
    overlap: Overlap
    published: Published | None = None

    @property
    def systems(self) -> tuple[Row, ...]:
        """Rows of what can be used; an oracle cannot."""
        return tuple(row for row in self.rows if row.kind != "oracle")

    @property
    def oracles(self) -> tuple[Row, ...]:
        """Rows of what chooses after seeing the answer."""
        return tuple(row for row in self.rows if row.kind == "oracle")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metric columns."""
        return tuple(self.rows[0].metrics)

    def row(self, name: str) -> Row:
        """The row of a system."""
        return next(row for row in self.rows if row.name == name)

    @property
    def top(self) -> Row:
        """The best system at the headline metric."""
        return max(self.systems, key=lambda row: row.metrics[HEADLINE])

    def best(self, metric: str) -> float:
        """Highest percent of a metric, as printed."""
        return max(round(row.metrics[metric], 2) for row in self.systems)

    def is_best(self, row: Row, metric: str) -> bool:
        """Whether a cell is the best of its column, as printed."""
        return row in self.systems and round(row.metrics[metric], 2) == self.best(metric)

    def marks(self, row: Row, metric: str) -> str:
        """Some of `MARKS`."""
        judges = zip((self.single, self.static), MARKS, strict=True)
        return "".join(
            mark
            for judge, mark in judges
            if row in self.systems
            and judge in row.paired
            and row.paired[judge][metric].is_significant
            and row.paired[judge][metric].diff > 0
        )

    @property
    def legend(self) -> str:
        """What the marks of this table say."""
        static = f"; {MARKS[1]} above {self.static}, the best static one" if self.static else ""
        return (
            f"{MARKS[0]} significantly above {self.single}, the best single system{static} (paired "
            "randomisation test over fold groups, p < 0.05 after Holm's correction over all rows "
            "and columns)."
        )

    def comparison(self, row: Row) -> str:
        """`win/tie/loss` against the best single system; a dash for that one itself."""
        paired = row.vs.get(self.single)
        return f"{paired.win}/{paired.tie}/{paired.loss}" if paired else ABSENT

    def header(self) -> list[str]:
        """Column titles."""
        return ["system", "kind", "protocol", *self.metrics, f"win/tie/loss vs {self.single}"]

    def words(self, row: Row) -> list[str]:
        """The leading cells of a row."""
        return [row.name, row.kind, self.protocol]

    def published_cells(self) -> list[list[str]]:
        """Rows of papers under the same columns."""
        if self.published is None:
            return []
        return [
            [name, "published", self.published.title]
            + [f"{row[metric]:.2f}" if metric in row else ABSENT for metric in self.metrics]
            + [ABSENT]
            for name, row in self.published.rows.items()
        ]


def to_markdown(table: Table) -> str:
    """Aligned Markdown with caption and legend below, published rows under them."""
    rows = [
        [
            *table.words(row),
            *(f"{row.metrics[m]:.2f}{table.marks(row, m)}" for m in table.metrics),
            table.comparison(row),
        ]
        for row in table.rows
    ]
    parts = [markdown_table(table.header(), rows, _WORDS), table.caption, table.legend]
    if table.published is not None:
        parts += [
            f"Published, {table.published.title}: {table.published.note}",
            markdown_table(table.header()[:-1], [r[:-1] for r in table.published_cells()], _WORDS),
        ]
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """Percents, win/tie/loss, hit counts and intervals, one system a line; no published rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = list(table.rows[0].hits)
    hits = [f"hits {column}" for column in columns]
    bounds = [f"{metric} {end}" for metric in table.metrics for end in ("low", "high")]
    writer.writerow([*table.header(), "queries", *hits, *bounds, "caption"])
    for row in table.rows:
        percents = [f"{row.metrics[metric]:.2f}" for metric in table.metrics]
        counts = [row.hits[column] for column in columns]
        ends = [f"{end:.2f}" for metric in table.metrics for end in row.ci95[metric]]
        writer.writerow(
            [
                *table.words(row),
                *percents,
                table.comparison(row),
                row.queries,
                *counts,
                *ends,
                table.caption,
            ]
        )
    return text.getvalue()


def to_latex(table: Table) -> str:
    """A booktabs table; the best of each column is bold, published rows are set apart."""
    lines = []
    for row in table.rows:
        cells = []
        for metric in table.metrics:
            number = f"{row.metrics[metric]:.2f}"
            bold = rf"\textbf{{{number}}}" if table.is_best(row, metric) else number
            marks = "".join(_LATEX_MARKS[mark] for mark in table.marks(row, metric))
            cells.append(f"{bold}$^{{{marks}}}$" if marks else bold)
        lines.append(line([*map(latex, table.words(row)), *cells, table.comparison(row)]))
    others = [line(map(latex, cells)) for cells in table.published_cells()]
    if others:
        others = [r"\midrule", *others]
    return latex_table(f"{table.caption} {table.legend}", table.header(), [*lines, *others], _WORDS)


def latex_table(caption: str, header: Sequence[str], lines: Sequence[str], words: int) -> str:
    """A booktabs table of finished lines."""
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{latex(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * words}{'r' * (len(header) - words)}}}",
            r"\toprule",
            line(map(latex, header)),
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def line(cells: Iterable[str]) -> str:
    """A row of LaTeX."""
    return " & ".join(cells) + r" \\"


def latex(text: str) -> str:
    """Text that stands in LaTeX as it stands here."""
    text = text.replace("\\", r"\textbackslash ")
    for plain in "&%$#_{}":
        text = text.replace(plain, f"\\{plain}")
    for mark, command in _LATEX_MARKS.items():
        text = text.replace(mark, f"${command}$")
    return text.replace("^", r"\^{}").replace("~", r"\textasciitilde ").replace("<", "$<$")
