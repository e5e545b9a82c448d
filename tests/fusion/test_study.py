import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.config import Between, StudyConfig
from dafm_ray.errors import ConfigError
from dafm_ray.fusion.study import (
    GROW,
    name_of,
    orders,
    settings_of,
    shapley,
    static_setting,
    subsets,
)

MODELS = ("a", "b", "c", "d")


def study(**change):
    given_keys = {"kind": "networks", "fusion": {"store": "s"}, "out": "o", **change}
    return StudyConfig(**given_keys)


def test_every_combination_of_lists_is_tried_once_beside_the_baseline():
    spaces = ({"network.width": (8, 16), "network.gate": (True, False)}, {"network.width": (8,)})
    found = settings_of(study(spaces=spaces, baseline={"network.width": 8}), MODELS, "a")
    assert found[0] == {"network.width": 8}
    assert len(found) == 1 + 4
    assert {"network.width": 16, "network.gate": False} in found


@pytest.mark.parametrize("log", [False, True])
def test_draws_are_spread_over_a_range_and_repeat(log):
    low, high, count = 3.0, 3000.0, 24
    spaces = ({"recipe.scaling": Between(low, high, log)},)
    found = settings_of(study(spaces=spaces, trials=count, seed=5), MODELS, "a")
    values = np.array([setting["recipe.scaling"] for setting in found[1:]])
    places = np.log(values / low) / np.log(high / low) if log else (values - low) / (high - low)
    # One in each of equal parts.
    assert sorted(np.floor(count * places).astype(int)) == list(range(count))
    assert settings_of(study(spaces=spaces, trials=count, seed=5), MODELS, "a") == found
    assert settings_of(study(spaces=spaces, trials=count, seed=6), MODELS, "a") != found


def test_the_lattice_and_the_orders():
    assert len(subsets(MODELS)) == 15
    assert len(orders(MODELS)) == 24
    assert [order[0] for order in orders(MODELS, "c")] == ["c"] * 6
    found = settings_of(study(kind="orders"), MODELS, "c")
    assert sum("models" in setting for setting in found) == 15
    assert [setting[GROW][0] for setting in found if GROW in setting] == ["c"] * 6
    every = settings_of(study(kind="orders", grown="all", most_orders=24), MODELS, "c")
    assert sum(GROW in setting for setting in every) == 24
    none = settings_of(study(kind="orders", grown="none"), MODELS, "c")
    assert len(none) == 15


@given(st.lists(st.floats(0, 100), min_size=7, max_size=7))
def test_shapley_values_are_the_mean_gain_over_all_orders(values):
    models = MODELS[:3]
    value = dict(zip(map(frozenset, subsets(models)), values, strict=True))
    found = shapley(models, value, 5.0)
    worth = {frozenset(): 5.0, **value}
    for model in models:
        gains = [
            worth[frozenset(order[: order.index(model) + 1])]
            - worth[frozenset(order[: order.index(model)])]
            for order in itertools.permutations(models)
        ]
        assert math.isclose(found[model], np.mean(gains), abs_tol=1e-9)
    assert math.isclose(sum(found.values()), value[frozenset(models)] - 5.0, abs_tol=1e-9)


def test_a_star_stands_for_every_model():
    spaces = ({"system": ("convex",), "weights.*": Between(0, 1), "strength": (0, 0.5)},)
    found = settings_of(study(kind="static", spaces=spaces, trials=7), MODELS, "a")
    assert len(found) == 1 + 7
    assert set(static_setting(found[1]).weights) == set(MODELS)


def test_names_depend_on_what_is_set_alone():
    assert name_of({"a": 1, "b": [2]}) == name_of({"b": [2], "a": 1})
    assert name_of({"a": 1}) != name_of({"a": 2})


def test_static_settings_have_sections():
    found = static_setting({"system": "convex", "weights.a": 1, "weights.b": 0.5})
    assert found.weights == {"a": 1, "b": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spaces": ({"recipe.scalling": (1,)},)}, "did you mean 'scaling'"),
        ({"spaces": ({"recipe.epochs": ("x",)},)}, "'recipe.epochs': the value should be"),
        ({"spaces": ({"models": (("a", "e"),)},)}, "there is no model 'e'"),
        ({"spaces": ({"k": (1,)},)}, "unknown key 'k'"),
        ({"spaces": ()}, "name at least one key"),
        ({"spaces": ({},)}, "name at least one key"),
        ({"spaces": ({"seeds": ()},)}, "seeds has no values"),
        ({"kind": "static", "spaces": ({"weights.e": (1.0,)},)}, "there is no model 'e'"),
        ({"kind": "static", "spaces": ({"syste": ("rrf",)},)}, "did you mean 'system'"),
        ({"kind": "orders", "spaces": ({"seeds": (1,)},)}, "has no space"),
        ({"spaces": ({"seeds": (1,)},), "report_folds": 4}, "leave two"),
        ({"spaces": ({"seeds": (1,)},) * 2, "search": "optuna"}, "takes one space"),
        ({"spaces": ({"sees": (1,)},), "search": "optuna"}, "did you mean 'seeds'"),
        ({"spaces": ({"store": ("t",)},)}, "the same for every trial"),
        ({"spaces": ({"seed": (1,)},)}, "the same for every trial"),
        ({"kind": "static", "spaces": ({"system": ("rff",)},)}, "did you mean 'rrf'"),
        (
            {
                "kind": "static",
                "spaces": ({"k": (1,)},),
                "fusion": {"store": "s", "validation": "t"},
            },
            "takes no validation",
        ),
    ],
)
def test_wrong_studies_end_in_one_message(change, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(study(**change), MODELS, "a")


def test_of_many_orders_some_are_drawn_and_too_many_models_are_refused():
    models = tuple("abcdef")
    found = settings_of(study(kind="orders"), models, "a")
    grown = [tuple(setting[GROW]) for setting in found if GROW in setting]
    assert len(grown) == 6
    assert len(set(grown)) == 6
    assert settings_of(study(kind="orders", seed=1), models, "a") != found
    with pytest.raises(ConfigError, match="too many"):
        settings_of(study(kind="orders"), tuple("abcdefghi"), "a")
