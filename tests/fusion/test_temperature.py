import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dafm_ray.config import Recipe
from dafm_ray.errors import ConfigError
from dafm_ray.fusion.temperature import Temperature, in_score_units

losses = st.lists(st.floats(0.01, 20), min_size=1, max_size=50)


@given(losses, st.floats(25, 1000))
def test_paper_is_equation_7_step_by_step(trace, scaling):
    tau = Temperature("paper", 0.02, scaling)
    by_hand = 0.02
    for loss in trace:
        by_hand = by_hand * (1 - loss / scaling)
        assert tau.update(loss) == pytest.approx(by_hand, rel=1e-12)
    assert [pair[0] for pair in tau.trace] == trace


@given(losses, st.floats(25, 1000))
def test_under_equation_7_tau_can_only_fall(trace, scaling):
    tau = Temperature("paper", 0.02, scaling)
    values = [0.02, *(tau.update(loss) for loss in trace)]
    assert all(later < earlier for earlier, later in pairwise(values))
    assert all(value > 0 for value in values)


@pytest.mark.parametrize("loss", [5.0, 5.1, 82.0])
def test_paper_stops_before_tau_is_0(loss):
    tau = Temperature("paper", 0.02, 5.0)
    tau.update(1.0)
    with pytest.raises(ConfigError, match="Raise the scaling factor, or choose mode paper_clamped"):
        tau.update(loss)
    assert tau.value == pytest.approx(0.016)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.1, 1000))
def test_clamped_and_centred_stay_in_their_bounds(trace, scaling):
    for mode in ("paper_clamped", "centred"):
        tau = Temperature(mode, 0.02, scaling)
        for loss in trace:
            low, high = (bound * 0.02 for bound in Temperature.bounds)
            assert low * (1 - 1e-9) <= tau.update(loss) <= high * (1 + 1e-9)


def test_centred_falls_above_the_trend_and_rises_below():
    tau = Temperature("centred", 0.02, 10.0)
    assert tau.update(4.0) == 0.02
    assert tau.update(5.0) < 0.02
    before = tau.value
    assert tau.update(3.0) > before


def test_fixed_stays():
    tau = Temperature("fixed", 0.3)
    assert [tau.update(loss) for loss in (9.0, 0.1)] == [0.3, 0.3]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_loss_passes_that_is_no_number(loss):
    with pytest.raises(ConfigError, match="the loss is"):
        Temperature("fixed", 0.3).update(loss)


@given(losses, losses)
def test_a_resumed_temperature_goes_on(first, second):
    whole = Temperature("centred", 0.02, 50.0)
    for loss in first:
        whole.update(loss)
    resumed = Temperature("centred", 0.02, 50.0)
    resumed.restore(whole.state())
    for loss in second:
        assert whole.update(loss) == resumed.update(loss)
    assert whole.trace == resumed.trace


def test_units_and_wrong_settings():
    assert in_score_units(0.02, 0.05) == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="all scores"):
        in_score_units(0.02, 0.0)
    with pytest.raises(ConfigError, match="above 0"):
        Temperature("paper", 0.0)


def test_by_epoch_tau_moves_once_by_the_mean_of_the_losses():
    temperature = Temperature.of(
        Recipe(temperature="paper", scaling=10.0, temperature_every="epoch"), 0.5
    )
    for loss in (1.0, 3.0):
        assert temperature.update(loss) == 0.5
    temperature.end_epoch()
    assert temperature.value == pytest.approx(0.5 * (1 - 2.0 / 10), rel=1e-12)
    assert temperature.trace == [(1.0, 0.5), (3.0, temperature.value)]
    temperature.end_epoch()
    assert temperature.value == pytest.approx(0.4, rel=1e-12)


def test_by_step_the_end_of_an_epoch_does_nothing():
    temperature = Temperature.of(Recipe(temperature="paper", scaling=10.0), 0.5)
    after = temperature.update(1.0)
    temperature.end_epoch()
    assert temperature.value == after
