"""The dynamic temperature of the contrastive loss (DAFM, eq. 7), and what mends it.

    tau_t = tau_{t-1} (1 - L_{t-1} / S)

With a positive loss tau can only fall; at L = S it is 0, above it negative. `paper` keeps the
equation and stops before that. `paper_clamped` bounds the factor and tau. `centred` uses the loss's
distance from its own running mean, so that tau rises when learning slows, which the paper's prose
asks for and its equation cannot do.
"""

from dataclasses import dataclass, field
from typing import Any

from dafm_ray.config import Recipe, TemperatureMode
from dafm_ray.errors import ConfigError

MEMORY = 0.9
"""Of the running mean of the loss."""


@dataclass
class Temperature:
    """tau, step by step.

    Attributes:
        mode: how the loss moves it.
        start: tau_0, in the units of the scores that are divided by it.
        scaling: S of eq. 7; a loss moves tau by its share of S.
        lowest_factor: of a step, in mode `paper_clamped`.
        bounds: of tau, as multiples of its start, in modes `paper_clamped` and `centred`.
        by_epoch: tau moves at the end of an epoch, by the mean of its losses.
        value: tau now.
        trace: (loss, tau after it) of every step.
    """

    mode: TemperatureMode
    start: float
    scaling: float = 500.0
    lowest_factor: float = 0.5
    bounds: tuple[float, float] = (0.25, 5.0)
    by_epoch: bool = False
    value: float = field(init=False)
    trace: list[tuple[float, float]] = field(default_factory=list)
    _mean: float | None = field(default=None, repr=False)
    _epoch: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.start <= 0 or self.scaling <= 0:
            raise ConfigError("temperature: start and scaling must be above 0")
        self.value = self.start

    @staticmethod
    def of(recipe: Recipe, start: float) -> "Temperature":
        """As a recipe says, starting in units of the normalised scores."""
        return Temperature(
            recipe.temperature,
            start,
            recipe.scaling,
            recipe.lowest_factor,
            recipe.tau_bounds,
            recipe.temperature_every == "epoch",
        )

    def update(self, loss: float) -> float:
        """Take the loss of a step; returns tau for the next.

        Raises:
            ConfigError: in mode `paper`, a loss that would bring tau to 0 or below; any loss that
                is no number.
        """
        if not abs(loss) < float("inf"):
            raise ConfigError(f"the loss is {loss} at tau {self.value:g}; raise tau's start")
        if self.by_epoch:
            self._epoch.append(loss)
        else:
            self._move(loss)
        self.trace.append((loss, self.value))
        return self.value

    def end_epoch(self) -> None:
        """Move tau where it moves by epoch; the trace shows it with the epoch's last step.

        Raises:
            ConfigError: as `update`.
        """
        if self._epoch:
            self._move(sum(self._epoch) / len(self._epoch))
            self._epoch.clear()
            self.trace[-1] = (self.trace[-1][0], self.value)

    def _move(self, loss: float) -> None:
        moved = self.value * self._factor(loss)
        if self.mode in ("paper_clamped", "centred"):
            low, high = (bound * self.start for bound in self.bounds)
            moved = min(max(moved, low), high)
        self.value = moved

    def _factor(self, loss: float) -> float:
        if self.mode == "fixed":
            return 1.0
        if self.mode == "centred":
            before = loss if self._mean is None else self._mean
            self._mean = MEMORY * before + (1 - MEMORY) * loss
            return 1 - (loss - before) / self.scaling
        factor = 1 - loss / self.scaling
        if self.mode == "paper_clamped":
            return min(max(factor, self.lowest_factor), 1.0)
        if factor <= 0:
            raise ConfigError(
                f"a loss of {loss:.4g} is not below the scaling factor {self.scaling:g}: tau would "
                "become 0 or negative. Raise the scaling factor, or choose mode paper_clamped"
            )
        return factor

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"value": self.value, "trace": list(self.trace), "mean": self._mean}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.value, self._mean = state["value"], state["mean"]
        self.trace = list(state["trace"])


def in_score_units(raw: float, mean_deviation: float) -> float:
    """tau stated for raw scores, for scores that were divided by their standard deviation.

    Args:
        raw: tau for raw scores, as the paper's 0.02 for cosines.
        mean_deviation: mean over queries and models of the raw scores' standard deviation.

    Raises:
        ConfigError: scores without spread.
    """
    if mean_deviation <= 0:
        raise ConfigError("all scores of a query are equal; there is nothing to learn from")
    return raw / mean_deviation
