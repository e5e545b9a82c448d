"""Figures of the report, as SVG that stands in the page."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dafm_ray.fusion.artefact import TRACE, is_artefact


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    svg: str
    caption: str


@dataclass
class _Drawn:
    drawing: Any
    svg: str = ""


@contextmanager
def _drawing(width: float, height: float) -> Iterator[_Drawn]:
    """A drawing in inches; its SVG stands at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    # A salt of its own, so that the same values give the same bytes.
    with rc_context({"svg.hashsalt": "dafm", "svg.fonttype": "none"}):
        drawn = _Drawn(Drawing(figsize=(width, height), layout="constrained"))
        yield drawn
        sink = io.StringIO()
        drawn.drawing.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    drawn.svg = text[text.index("<svg") :]


def temperature_figures(fusions: Sequence[str]) -> list[Figure]:
    """Loss and temperature, step by step, of every trained fusion among some names."""
    named = [Path(name) for name in fusions if is_artefact(name)]
    return [
        Figure(temperature_svg(path / TRACE), f"{path.name}: loss and temperature of every network")
        for path in named
        if (path / TRACE).is_file()
    ]


def temperature_svg(trace: Path) -> str:
    """Draw a `temperature.csv`: a line a network, the loss above, tau below."""
    with trace.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with _drawing(7, 4) as drawn:
        above, below = drawn.drawing.subplots(2, 1, sharex=True)
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            steps = [int(row["step"]) for row in own]
            for axes, column in ((above, "loss"), (below, "tau")):
                axes.plot(steps, [float(row[column]) for row in own], linewidth=1, alpha=0.8)
        above.set_ylabel("loss")
        below.set_ylabel("temperature")
        below.set_xlabel("step")
    return drawn.svg


def scatter_figure(
    x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, level: float, log: bool
) -> str:
    """Points, and a line at a level to compare them with."""
    with _drawing(7, 3) as drawn:
        axes = drawn.drawing.subplots()
        axes.axhline(level, color="0.6", linewidth=1)
        axes.plot(x, y, "o", markersize=4, alpha=0.8)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_xscale("log")
    return drawn.svg


def bar_figure(bars: Mapping[str, Sequence[float]], labels: Sequence[str], axis: str) -> str:
    """A group of bars a label.

    Args:
        bars: name -> a value a label.
        labels: below the groups.
        axis: what the values are.
    """
    with _drawing(7, 3) as drawn:
        axes = drawn.drawing.subplots()
        width = 0.8 / len(bars)
        for n, (name, values) in enumerate(bars.items()):
            places = [place + (n - (len(bars) - 1) / 2) * width for place in range(len(labels))]
            axes.bar(places, values, width, label=name)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel(axis)
        axes.legend(fontsize=8)
    return drawn.svg


Order = tuple[str, ...]


def line_figure(
    named: Mapping[Order, Sequence[float]],
    every: Mapping[Order, Sequence[float]],
    grown: Mapping[Order, Sequence[float]],
    label: str,
    published: Mapping[str, Sequence[Sequence[float]]],
) -> str:
    """A metric against the number of fused models, a line an order.

    Args:
        named: orders with a colour and a name.
        every: all orders.
        grown: values of orders in which a fusion was grown.
        label: of the metric.
        published: data set -> points after each model, from elsewhere.
    """
    with _drawing(10, 4.5) as drawn:
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
    return drawn.svg
