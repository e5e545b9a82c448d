"""Every single model against chance, and against the model it was fine-tuned from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dafm_ray.errors import ConfigError, unknown
from dafm_ray.evaluation.chance import RandomOrder, chance_p_values
from dafm_ray.evaluation.protocols import HEADLINE
from dafm_ray.evaluation.significance import SIGNIFICANT, Paired, Resampling, compare
from dafm_ray.evaluation.summary import Summary
from dafm_ray.report.findings import Cells, Section
from dafm_ray.report.tables import ABSENT

RECALLS = (HEADLINE, "R@1", "R@50")
"""Columns that are compared, where the protocol has them."""

_CHANCE, _START = "difference to chance", "difference to its start"


@dataclass(frozen=True)
class Standing:
    """A single model.

    Attributes:
        name: of the model.
        start: the model it was fine-tuned from; empty if none is named.
        percents: metric -> recall.
        hits: at the headline metric.
        chance: metric -> comparison with a random order.
        started: metric -> comparison with its start; empty without one.
    """

    name: str
    start: str
    percents: dict[str, float]
    hits: int
    chance: dict[str, Paired]
    started: dict[str, Paired]


@dataclass(frozen=True)
class Standings:
    """All single models.

    Attributes:
        chance: metric -> percent that a random order is expected to reach.
        hits: expected of a random order at the headline metric.
        models: in the order of the table.
    """

    chance: dict[str, float]
    hits: float
    models: tuple[Standing, ...]

    @property
    def notes(self) -> list[str]:
        """Models that are not above chance, and every model beside its start."""
        doubted = [note for model in self.models if (note := self._doubt(model))]
        if not doubted:
            several = len(self.models) > 1
            who = "Every single model" if several else self.models[0].name
            doubted = [f"{who} is above chance at {HEADLINE} ({self.chance[HEADLINE]:.2f} %)."]
        return [*doubted, *(_beside_start(model) for model in self.models if model.start)]

    def _doubt(self, model: Standing) -> str:
        """In a sentence; empty if the model is above chance."""
        paired = model.chance[HEADLINE]
        low, high = paired.ci95
        if low > 0:
            return ""
        # An interval of few hits is too narrow; what is expected says whether they are too few.
        below = high < 0 and paired.p < SIGNIFICANT
        return (
            f"{model.name} {'is below' if below else 'cannot be told from'} chance at {HEADLINE}: "
            f"{_points(paired)}, {model.hits:,} hits where a random order has {self.hits:,.1f}"
            f"{_uncorrected(paired, below)}."
        )

    def section(self) -> Section:
        """As a table, the headline metric first."""
        with_starts = any(model.start for model in self.models)
        rows: tuple[Cells, ...] = tuple(
            (
                *((model.name, model.start or ABSENT) if with_starts else (model.name,)),
                metric,
                f"{model.percents[metric]:.2f}",
                f"{percent:.2f}",
                model.chance[metric],
                *(_started(model, metric) if with_starts else ()),
            )
            for metric, percent in self.chance.items()
            for model in self.models
        )
        of_starts = ", and less that of the model it was fine-tuned from" if with_starts else ""
        text = (
            "Recall of every single model less what a random order of the candidates is expected "
            f"to reach (chance){of_starts}, on the same queries: points with their 95 % interval, "
            "* significant after Holm's correction over the table."
        )
        if not with_starts:
            header = ("model", "metric", "recall", "chance", _CHANCE)
            return Section("Against chance", text, header, rows, words=2, differences=(_CHANCE,))
        return Section(
            title="Against chance and its start",
            text=f"{text} Win/tie/loss counts queries against the start.",
            header=(
                "model",
                "start",
                "metric",
                "recall",
                "chance",
                _CHANCE,
                _START,
                "win/tie/loss",
            ),
            rows=rows,
            words=3,
            differences=(_CHANCE, _START),
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """Of one system, for `metrics.json`; empty if it is no single model."""
        for model in self.models:
            if model.name == name:
                started = {"name": model.start, "metrics": _plain(model.started)}
                return {
                    "chance": _plain(model.chance),
                    "start": started if model.start else None,
                }
        return {}


def refuse_unknown_starts(starts: Mapping[str, str], models: Sequence[str]) -> None:
    """ConfigError if a model or its start is not in the store."""
    for name in (*starts, *starts.values()):
        if name not in models:
            raise ConfigError(f"starts: {unknown('model of the store', name, models)}")


def compare_with_starts(
    summaries: Mapping[str, Summary],
    order: RandomOrder,
    starts: Mapping[str, str],
    resampling: Resampling,
) -> Standings:
    """Compare every single model with chance and with its start, corrected for all together.

    Args:
        summaries: name -> numbers of the system.
        order: random, of the same queries.
        starts: model -> the model it was fine-tuned from, both single.
        resampling: of the queries.
    """
    singles = {name: one for name, one in summaries.items() if one.system.kind == "single"}
    rules = next(iter(singles.values())).protocol
    expected = {
        metric: order.hits(k)
        for metric in RECALLS
        if (k := int(metric.partition("@")[2])) in rules.recalls
    }
    asked = [(name, metric) for metric in expected for name in singles]
    pairs = [(m, singles[name].values[m], expected[m]) for name, m in asked]
    least_p = [
        chance_p_values(
            np.stack([one.values[metric] for one in singles.values()], axis=1), own_Q, resampling
        )
        for metric, own_Q in expected.items()
    ]
    started = [(name, metric) for name, metric in asked if name in starts]
    pairs += [(m, singles[name].values[m], singles[starts[name]].values[m]) for name, m in started]
    found = compare(pairs, resampling, np.concatenate([*least_p, np.zeros(len(started))]))
    to_chance = dict(zip(asked, found[: len(asked)], strict=True))
    to_start = dict(zip(started, found[len(asked) :], strict=True))
    return Standings(
        chance={metric: 100 * resampling.mean(own_Q) for metric, own_Q in expected.items()},
        hits=float(expected[HEADLINE].sum()),
        models=tuple(
            Standing(
                name=name,
                start=starts.get(name, ""),
                percents={metric: one.percent(metric) for metric in expected},
                hits=int(one.hits(HEADLINE).sum()),
                chance={metric: to_chance[name, metric] for metric in expected},
                started={m: to_start[name, m] for m in expected if name in starts},
            )
            for name, one in singles.items()
        ),
    )


def _started(model: Standing, metric: str) -> Cells:
    if not model.start:
        return ABSENT, ABSENT
    paired = model.started[metric]
    return paired, f"{paired.win}/{paired.tie}/{paired.loss}"


def _beside_start(model: Standing) -> str:
    paired = model.started[HEADLINE]
    low, high = paired.ci95
    verdict = "is above" if low > 0 else "is below" if high < 0 else "cannot be told from"
    beside = f"{model.name} {verdict} its start {model.start} at {HEADLINE}: {_points(paired)}"
    return f"{beside}{_uncorrected(paired, low > 0 or high < 0)}."


def _uncorrected(paired: Paired, told: bool) -> str:
    """What to add to a difference that is told by its interval alone."""
    return ", but not after Holm's correction" if told and not paired.is_significant else ""


def _points(paired: Paired) -> str:
    low, high = paired.ci95
    return f"{paired.diff:+.2f} points [{low:+.2f}, {high:+.2f}]"


def _plain(compared: Mapping[str, Paired]) -> dict[str, Any]:
    return {metric: asdict(paired) for metric, paired in compared.items()}
