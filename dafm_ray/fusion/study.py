"""What a study tries: settings and their names, subsets and orders of models, what each adds."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dafm_ray.config import Between, Space, StaticSetting, StudyConfig, parse_config
from dafm_ray.datasets.base import digest
from dafm_ray.errors import ConfigError, unknown
from dafm_ray.fusion.static import static_fusion

Setting = dict[str, Any]
"""Dotted key -> value; `grow` -> models in the order they are added."""

GROW = "grow"
CONVEX = "convex"

MOST_MODELS = 8
"""Of a study of orders: 255 subsets and 40,320 orders."""


def settings_of(study: StudyConfig, models: Sequence[str], first: str) -> list[Setting]:
    """Everything a study tries, the baseline first, nothing twice.

    Args:
        study: whose ranges are drawn from, unless `optuna` does that.
        models: of the store.
        first: the model that orders start with.

    Raises:
        ConfigError: a key that there is not, or a value that it cannot have.
    """
    if study.kind == "orders" and len(models) > MOST_MODELS:
        raise ConfigError(
            f"orders of {len(models)} models are too many; name up to {MOST_MODELS} "
            "in fusion.models"
        )
    if study.kind == "orders":
        found: Iterable[Setting] = itertools.chain(
            ({"models": list(subset)} for subset in subsets(models)),
            ({GROW: list(order)} for order in grown_orders(study, models, first)),
        )
    else:
        spaces = [_expanded(space, models) for space in study.spaces]
        drawn = itertools.chain(*(_drawn(study, n, space) for n, space in enumerate(spaces)))
        found = itertools.chain([study.baseline], drawn)
    distinct = {name_of(setting): setting for setting in found}
    for setting in distinct.values():
        _check(study, setting, models)
    settings = list(distinct.values())
    # What optuna suggests later is of the same keys and values.
    return settings[:1] if study.search == "optuna" else settings


def _check(study: StudyConfig, setting: Setting, models: Sequence[str]) -> None:
    """ConfigError if a setting cannot be tried."""
    if study.kind == "static":
        static = static_setting(setting)
        if static.system != CONVEX:
            static_fusion(static.system)
        named: Iterable[str] = static.weights
    elif GROW in setting:
        named = setting[GROW]
    else:
        named = study.with_setting(setting).models
    for name in named:
        if name not in models:
            raise ConfigError(f"spaces: {unknown('model', name, models)}")


def static_setting(setting: Setting) -> StaticSetting:
    """A setting of a study of kind `static`."""
    values: dict[str, Any] = {}
    for key, value in setting.items():
        section, _, name = key.partition(".")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return parse_config(StaticSetting, values, "spaces")


def name_of(setting: Setting) -> str:
    """The same for the same setting, whatever else is tried."""
    return digest([json.dumps(setting, sort_keys=True)])[:10]


def _expanded(space: Space, models: Sequence[str]) -> Space:
    """`weights.*` stands for a key a model."""
    found: Space = {}
    for key, values in space.items():
        section = key.removesuffix("*")
        found |= {key: values} if section == key else {section + m: values for m in models}
    return found


def _drawn(study: StudyConfig, n: int, space: Space) -> Iterator[Setting]:
    """All of a space of lists; of one with ranges so many draws, spread evenly over each."""
    ranges = {key for key, values in space.items() if isinstance(values, Between)}
    if not ranges:
        lists = [values for values in space.values() if not isinstance(values, Between)]
        yield from (dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*lists))
        return
    rng = np.random.default_rng([study.seed, n])
    columns = [
        _spread(values, study.trials, rng)
        if isinstance(values, Between)
        else [values[i] for i in rng.integers(len(values), size=study.trials)]
        for values in space.values()
    ]
    yield from (dict(zip(space, drawn, strict=True)) for drawn in zip(*columns, strict=True))


def _spread(between: Between, count: int, rng: np.random.Generator) -> list[float]:
    """One draw from each of `count` equal parts of a range, in random order."""
    places = (rng.permutation(count) + rng.random(count)) / count
    low, high = between.low, between.high
    if between.log:
        return [float(f"{low * (high / low) ** place:.6g}") for place in places]
    return [float(f"{low + (high - low) * place:.6g}") for place in places]


def subsets(models: Sequence[str]) -> list[tuple[str, ...]]:
    """All but the empty one, small ones first."""
    sizes = range(1, len(models) + 1)
    return [subset for size in sizes for subset in itertools.combinations(models, size)]


def orders(models: Sequence[str], first: str = "") -> list[tuple[str, ...]]:
    """All orders, or those that begin with one model."""
    every = itertools.permutations(models)
    return [order for order in every if not first or order[0] == first]


def grown_orders(study: StudyConfig, models: Sequence[str], first: str) -> list[tuple[str, ...]]:
    """The orders that a fusion is grown in, model by model."""
    if study.grown == "none" or len(models) < 2:
        return []
    return drawn_orders(study, orders(models, first if study.grown == "first" else ""))


def drawn_orders(study: StudyConfig, every: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """As many as a study wants, in their order."""
    rng = np.random.default_rng(study.seed)
    drawn = rng.permutation(len(every))[: study.most_orders]
    return [every[n] for n in np.sort(drawn)]


def shapley(
    models: Sequence[str], value: Mapping[frozenset[str], float], chance: float
) -> dict[str, float]:
    """What each model adds, averaged over all orders (Shapley, 1953); they add up to the value of
    all models less that of none.

    Args:
        models: M.
        value: of each of the 2^M - 1 subsets.
        chance: of no model.
    """
    worth = {frozenset[str](): chance, **value}
    count = len(models)
    found = {}
    for model in models:
        others = [other for other in models if other != model]
        found[model] = sum(
            (worth[frozenset((*before, model))] - worth[frozenset(before)])
            / (count * math.comb(count - 1, len(before)))
            for size in range(count)
            for before in itertools.combinations(others, size)
        )
    return found
