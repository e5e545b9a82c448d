"""Figures of the report, as SVG that stands in the page."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dafm_ray.fusion.artefact import TRACE, is_artefact


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    svg: str
    caption: str


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
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    with trace.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    # A salt of its own, so that the same trace gives the same bytes.
    with rc_context({"svg.hashsalt": "dafm", "svg.fonttype": "none"}):
        drawing = Drawing(figsize=(7, 4), layout="constrained")
        above, below = drawing.subplots(2, 1, sharex=True)
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            steps = [int(row["step"]) for row in own]
            for axes, column in ((above, "loss"), (below, "tau")):
                axes.plot(steps, [float(row[column]) for row in own], linewidth=1, alpha=0.8)
        above.set_ylabel("loss")
        below.set_ylabel("temperature")
        below.set_xlabel("step")
        sink = io.StringIO()
        drawing.savefig(sink, format="svg", metadata={"Date": None})
    text = sink.getvalue()
    return text[text.index("<svg") :]
