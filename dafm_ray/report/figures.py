"""Figures of the reports, as SVG in the page and as files for papers."""

import base64
import csv
import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.evaluation.metrics import Ints
from dafm_ray.fusion.artefact import is_artefact, read_trace
from dafm_ray.storage import open_storage
from dafm_ray.uris import above, last_part, shown

FIGURES = "figures"
"""Folder of the drawings beside a report."""


ORDERS = "orders"
"""Name of the figure of incremental fusion."""

SHOWN_RANKS = 100
"""Last K of the curves of recall."""


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows.

    Attributes:
        name: of its files.
        caption: in words, for those who cannot see it, too.
        svg: the file.
        png: the file.
    """

    name: str
    caption: str
    svg: bytes
    png: bytes = b""

    @property
    def uri(self) -> str:
        """The drawing as a data URI, which can run nothing and loads nothing."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def write_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write `NAME.svg` and `NAME.png` of each to `figures` in a folder."""
    if figures:
        (folder / FIGURES).mkdir(exist_ok=True)
    for figure in figures:
        (folder / FIGURES / f"{figure.name}.svg").write_bytes(figure.svg)
        (folder / FIGURES / f"{figure.name}.png").write_bytes(figure.png)


def read_figure(file: Path | str) -> Figure:
    """A drawing that `write_figures` wrote, at a path or URI; its caption is the SVG's title.

    Raises:
        DataError: there is none.
    """
    folder, name = above(str(file)), last_part(str(file))
    try:
        svg = open_storage(folder).read(name).to_pybytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"there is no figure {shown(str(file))}; run `dafm fuse tune` with kind: orders there"
        ) from None
    title = re.search(r"<dc:title>(.*?)</dc:title>", svg.decode(errors="replace"), re.DOTALL)
    stem = name.removesuffix(".svg")
    return Figure(stem, html.unescape(title[1]) if title else stem, svg)


@dataclass
class _Drawn:
    name: str
    caption: str
    drawing: Any
    svg: bytes = b""
    png: bytes = b""

    @property
    def figure(self) -> Figure:
        """The finished figure."""
        return Figure(self.name, self.caption, self.svg, self.png)


@contextmanager
def _drawing(name: str, caption: str, width: float, height: float) -> Iterator[_Drawn]:
    """A drawing in inches; its files stand at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    # A salt of its own, so that the same values give the same bytes.
    with rc_context({"svg.hashsalt": "dafm", "svg.fonttype": "none"}):
        drawn = _Drawn(name, caption, Drawing(figsize=(width, height), layout="constrained"))
        yield drawn
        svg, png = io.BytesIO(), io.BytesIO()
        drawn.drawing.savefig(svg, format="svg", metadata={"Date": None, "Title": caption})
        drawn.drawing.savefig(png, format="png", dpi=200)
    drawn.svg, drawn.png = svg.getvalue(), png.getvalue()


def temperature_figures(fusions: Sequence[str]) -> list[Figure]:
    """Loss and temperature, step by step, of every trained fusion among some names."""
    named = [name for name in fusions if is_artefact(name)]
    traces = [(n, name, read_trace(name)) for n, name in enumerate(named)]
    return [
        temperature_figure(
            trace,
            f"temperature_{n}" if n else "temperature",
            f"{last_part(name)}: loss and temperature of every network",
        )
        for n, name, trace in traces
        if trace is not None
    ]


def temperature_figure(trace: str, name: str, caption: str) -> Figure:
    """Draw a `temperature.csv`: a line a network, the loss above, tau below."""
    rows = list(csv.DictReader(io.StringIO(trace, newline="")))
    with _drawing(name, caption, 7, 4) as drawn:
        above, below = drawn.drawing.subplots(2, 1, sharex=True)
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            steps = [int(row["step"]) for row in own]
            for axes, column in ((above, "loss"), (below, "tau")):
                axes.plot(steps, [float(row[column]) for row in own], linewidth=1, alpha=0.8)
        above.set_ylabel("loss")
        below.set_ylabel("temperature")
        below.set_xlabel("step")
    return drawn.figure


def recall_figure(ranks: Mapping[str, Ints], caption: str) -> Figure:
    """Recall@K against K, a line a system.

    Args:
        ranks: system -> (Q,) rank of the best target of each query.
        caption: of the figure.
    """
    cutoffs = np.arange(1, SHOWN_RANKS + 1)
    with _drawing("recall", caption, 7, 3.5) as drawn:
        axes = drawn.drawing.subplots()
        for name, ranks_Q in ranks.items():
            found = np.searchsorted(np.sort(ranks_Q), cutoffs, side="right")
            axes.plot(cutoffs, 100 * found / len(ranks_Q), linewidth=1.4, label=name)
        axes.set_xscale("log")
        axes.set_xticks([1, 5, 10, 50, 100], ["1", "5", "10", "50", "100"])
        axes.set_xlabel("K")
        axes.set_ylabel("Recall@K (%)")
        axes.grid(color="0.9")
        drawn.drawing.legend(fontsize=8, loc="outside right upper")
    return drawn.figure


def scatter_figure(
    x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, level: float, log: bool
) -> Figure:
    """Points, and a line at a level to compare them with."""
    name = f"{y_label}_{x_label}".replace("@", "").replace(".", "_")
    caption = f"{y_label} against {x_label}; the line is the baseline"
    with _drawing(name, caption, 7, 3) as drawn:
        axes = drawn.drawing.subplots()
        axes.axhline(level, color="0.6", linewidth=1)
        axes.plot(x, y, "o", markersize=4, alpha=0.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_xscale("log")
    return drawn.figure


def bar_figure(
    name: str,
    caption: str,
    bars: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    axis: str,
) -> Figure:
    """A group of bars a label.

    Args:
        name: of the files.
        caption: of the figure.
        bars: label in the legend -> a value a label.
        labels: below the groups.
        axis: what the values are.
    """
    with _drawing(name, caption, 7, 3) as drawn:
        axes = drawn.drawing.subplots()
        width = 0.8 / len(bars)
        for n, (label, values) in enumerate(bars.items()):
            places = [place + (n - (len(bars) - 1) / 2) * width for place in range(len(labels))]
            axes.bar(places, values, width, label=label)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel(axis)
        axes.legend(fontsize=8)
    return drawn.figure


Order = tuple[str, ...]


def line_figure(
    named: Mapping[Order, Sequence[float]],
    every: Mapping[Order, Sequence[float]],
    grown: Mapping[Order, Sequence[float]],
    label: str,
    published: Mapping[str, Sequence[Sequence[float]]],
    caption: str,
) -> Figure:
    """A metric against the number of fused models, a line an order.

    Args:
        named: orders with a colour and a name.
        every: all orders.
        grown: values of orders in which a fusion was grown.
        label: of the metric.
        published: data set -> points after each model, from elsewhere.
        caption: of the figure.
    """
    with _drawing(ORDERS, caption, 10, 4.5) as drawn:
        left, middle, right = drawn.drawing.subplots(1, 3, width_ratios=(4, 2, 2))
        colours = {order: f"C{n}" for n, order in enumerate(named)}
        for order, path in every.items():
            shade = colours.get(order, "0.75")
            middle.plot(range(1, len(path) + 1), path, color=shade, linewidth=1)
        for order, path in named.items():
            steps = range(1, len(path) + 1)
            left.plot(
                steps, path, "o-", color=colours[order], markersize=4, label=" + ".join(order)
            )
        for order, path in grown.items():
            shade = colours.get(order, "0.6")
            left.plot(range(1, len(path) + 1), path, "--", color=shade, linewidth=1.2)
        for axes in (left, middle):
            axes.set_xticks(range(1, max(map(len, every.values())) + 1))
            axes.set_xlabel("fused models")
        left.set_ylabel(label)
        left.legend(fontsize=7, loc="lower right")
        middle.set_title("all orders", fontsize=9)
        for title, points in published.items():
            pairs = [(n, p) for n, several in enumerate(points, 1) for p in several]
            right.plot([n for n, _ in pairs], [p for _, p in pairs], "x", label=title)
        right.set_xticks(range(1, 1 + max(map(len, published.values()))))
        right.set_title("published (DAFM), Rmean", fontsize=9)
        right.legend(fontsize=7)
    return drawn.figure
