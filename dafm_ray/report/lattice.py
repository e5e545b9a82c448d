"""What a study of orders says: subsets of the models, orders through them, what each adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dafm_ray.errors import DataError
from dafm_ray.files import write_csv
from dafm_ray.fusion.study import GROW, drawn_orders, orders, shapley
from dafm_ray.fusion.trial import Chance
from dafm_ray.fusion.tune import Studied
from dafm_ray.report.figures import Figure, Order, bar_figure, line_figure
from dafm_ray.report.findings import Findings, Section

PUBLISHED = {
    "CIRR test1": ((82.07,), (83.0, 83.3), (83.9, 84.0), (84.43,)),
    "FashionIQ val": ((64.87,), (), (), (67.48,)),
}
"""DAFM, Figure 3: Rmean after each model that is added to SPRC, as far as the paper gives it."""


@dataclass(frozen=True)
class Lattice:
    """Numbers of every subset.

    Attributes:
        models: M names.
        metrics: subset -> metric -> percent; 2^M - 1 of them.
        metric: the study's.
        grown: order -> the metric after each model that was added to a fusion.
        chance: the metric of no model.
    """

    models: tuple[str, ...]
    metrics: dict[frozenset[str], Mapping[str, float]]
    metric: str
    grown: dict[Order, list[float]]
    chance: float

    @staticmethod
    def of(studied: Studied) -> "Lattice":
        """From the trials.

        Raises:
            DataError: a subset came to nothing.
        """
        metrics: dict[frozenset[str], Mapping[str, float]] = {}
        grown: dict[Order, list[float]] = {}
        for trial in studied.usable:
            if GROW in trial.setting:
                steps = [step[studied.study.metric] for step in trial.steps]
                grown[tuple(trial.setting[GROW])] = steps
            else:
                subset = frozenset(trial.setting["models"])
                metrics[subset] = trial.reported or trial.metrics or {}
        models = tuple(sorted(set().union(*metrics)))
        if len(metrics) < 2 ** len(models) - 1:
            raise DataError(f"{studied.study.out}: some subsets came to nothing; see trials.csv")
        metric = studied.study.metric
        return Lattice(models, metrics, metric, grown, studied.alone[Chance.name][metric])

    @property
    def value(self) -> dict[frozenset[str], float]:
        """The study's metric of every subset."""
        return {subset: found[self.metric] for subset, found in self.metrics.items()}

    @property
    def whole(self) -> float:
        """Of all models."""
        return self.value[frozenset(self.models)]

    @property
    def shares(self) -> dict[str, float]:
        """Shapley value of each model, the largest first."""
        found = shapley(self.models, self.value, self.chance)
        return dict(sorted(found.items(), key=lambda share: -share[1]))

    def added_last(self, model: str) -> float:
        """What is gained with a model when all others are there."""
        return self.whole - self.value.get(frozenset(self.models) - {model}, self.chance)

    @property
    def paths(self) -> dict[Order, list[float]]:
        """Every order -> the metric after each model, from subsets that were trained once."""
        value = self.value
        return {
            order: [value[frozenset(order[: n + 1])] for n in range(len(order))]
            for order in orders(self.models)
        }


def find_in_orders(studied: Studied, root: Path) -> Findings:
    """Tables, figure and sentences; writes `subsets.csv`, `orders.csv` and `models.csv`."""
    lattice = Lattice.of(studied)
    validated = studied.study.base.validation_stores
    where = "the validation store" if validated else "all queries, out of fold"
    sections = [
        _models(studied, lattice, where, root / "models.csv"),
        _subsets(lattice, where, root / "subsets.csv"),
        _published(),
    ]
    _write_orders(lattice, root / "orders.csv")
    figures = [_figure(studied, lattice, where), _bars(lattice, where)]
    return Findings(_notes(studied, lattice, where), sections, figures)


def _notes(studied: Studied, lattice: Lattice, where: str) -> list[str]:
    first, paths = studied.first, lattice.paths
    steps = {order: float(np.diff(path).min(initial=np.inf)) for order, path in paths.items()}
    falls = sum(step < 0 for step in steps.values())
    deepest = min(steps, key=lambda order: steps[order])
    most = f", by {-steps[deepest]:.2f} points at most ({' > '.join(deepest)})" if falls else ""
    notes = [
        f"{lattice.metric} on {where}: all {len(lattice.models)} models {lattice.whole:.2f} %.",
    ]
    if len(lattice.models) < 2:
        return notes
    notes.append(
        f"Of {len(paths)} orders through {len(lattice.metrics)} trained subsets, "
        f"{len(paths) - falls} rise with every model and {falls} fall at some step{most}."
    )
    from_first = [step for order, step in steps.items() if order[0] == first]
    notes.append(
        f"Orders that start at {first}: the smallest step is {min(from_first):+.2f} points."
    )
    if lattice.grown:
        ends = [path[-1] for path in lattice.grown.values()]
        notes.append(
            f"Grown model by model, where the order can matter, {len(ends)} orders end between "
            f"{min(ends):.2f} and {max(ends):.2f} % (spread {max(ends) - min(ends):.2f}); trained "
            f"at once, all of them end at {lattice.whole:.2f} %. A grown fusion is trained anew "
            "with every model, so it has learned for more epochs."
        )
    return notes


def _models(studied: Studied, lattice: Lattice, where: str, file: Path) -> Section:
    rows = []
    for model, share in lattice.shares.items():
        alone = studied.alone[model][lattice.metric]
        own = lattice.value[frozenset((model,))]
        last = f"{lattice.added_last(model):+.2f}"
        rows.append((model, f"{alone:.2f}", f"{own:.2f}", f"{share:.2f}", last))
    header = ("model", "its own ranking", "fusion of it alone", "Shapley value", "added last")
    write_csv(file, header, rows)
    text = (
        f"{lattice.metric} on {where}. The Shapley value is what a model adds, averaged over all "
        f"orders; the values add up to all models ({lattice.whole:.2f}) less chance "
        f"({lattice.chance:.2f})."
    )
    return Section("What each model adds", text, header, tuple(rows))


def _subsets(lattice: Lattice, where: str, file: Path) -> Section:
    names = list(next(iter(lattice.metrics.values())))
    value = lattice.value
    header = ("models", "count", *names)
    rows = [
        (
            " ".join(sorted(subset)),
            str(len(subset)),
            *(f"{lattice.metrics[subset][name]:.2f}" for name in names),
        )
        for subset in sorted(value, key=lambda subset: (len(subset), -value[subset]))
    ]
    write_csv(file, header, rows)
    return Section("Subsets", f"Each trained once; on {where}.", header, tuple(rows))


def _write_orders(lattice: Lattice, file: Path) -> None:
    rows = []
    for order, path in lattice.paths.items():
        grown: Sequence[float | None] = lattice.grown.get(order, [None] * len(path))
        for n, (trained, step) in enumerate(zip(path, grown, strict=True), 1):
            shown = "" if step is None else f"{step:.4f}"
            rows.append((" ".join(order), str(n), f"{trained:.4f}", shown))
    metric = lattice.metric
    write_csv(file, ("order", "models", f"{metric} trained", f"{metric} grown"), rows)


def _figure(studied: Studied, lattice: Lattice, where: str) -> Figure:
    paths = lattice.paths
    from_first = [order for order in paths if order[0] == studied.first]
    named = {o: paths[o] for o in lattice.grown or drawn_orders(studied.study, from_first)}
    caption = (
        f"{lattice.metric} on {where} against the number of fused models. Left: some orders, "
        "trained at once (lines) and grown model by model (dashed). Middle: all orders. Right: "
        "points that DAFM publishes, of other models on its own data, not comparable with ours."
    )
    return line_figure(named, paths, lattice.grown, lattice.metric, PUBLISHED, caption)


def _bars(lattice: Lattice, where: str) -> Figure:
    shares = lattice.shares
    last = [lattice.added_last(model) for model in shares]
    bars = {"Shapley value": list(shares.values()), "added last": last}
    caption = f"What each model adds to {lattice.metric} on {where}, in points"
    return bar_figure("contributions", caption, bars, list(shares), lattice.metric)


def _published() -> Section:
    rows = tuple(
        (title, *(" / ".join(f"{p:.2f}" for p in points) or "not given" for points in steps))
        for title, steps in PUBLISHED.items()
    )
    text = "DAFM, Figure 3, as far as it gives numbers: Rmean, starting at SPRC. Not ours."
    return Section("Published", text, ("data", "1 model", "2 models", "3 models", "4 models"), rows)
