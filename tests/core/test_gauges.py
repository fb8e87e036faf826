"""When signals are gathered and read, what they remember, and what they cost."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from frostline.clock import Duration, Progress
from frostline.errors import DurationError, PolicyError
from frostline.gauges import Gauges, window
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.signals import Matrix, Need

GROUPS = LayerGroups(
    tuple(LayerGroup(f"g{i}", i, (TensorInfo(f"g{i}.w"),), calls=i < 2) for i in range(3))
)
EVERY = Duration.parse


@dataclass
class Numbers:
    """A probe whose gradient, weight and activation are the number of the step."""

    step: float
    frozen: frozenset[str] = frozenset()
    asked: list[str] = field(default_factory=list)

    def trains(self, unit: LayerGroup) -> bool:
        return unit.name not in self.frozen

    def gradients(self, unit: LayerGroup) -> list[Any]:
        self.asked.append(unit.name)
        return [np.array([self.step])]

    def weights(self, unit: LayerGroup) -> list[Any]:
        return [np.array([self.step**2])]

    def norm(self, arrays: Sequence[Any], order: Literal[1, 2]) -> float:
        assert len(arrays) == 1
        return float(abs(arrays[0]).sum())

    def dot(self, first: Any, second: Any) -> float:
        return float((first[0] * second[0]).sum())

    def matrices(self, unit: LayerGroup) -> list[Matrix]:
        return [Matrix(2, 2, [2.0, 1.0])]

    def learning_rate(self, unit: LayerGroup) -> float:
        return 1.0

    def loss(self) -> float:
        return self.step

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Any:
        raise AssertionError(unit)

    def update(self, unit: LayerGroup) -> list[Any]:
        return [np.array([1.0])]


def gauges_for(*needs: Need, steps: int = 100, epoch: int = 10) -> Gauges:
    return Gauges(needs, Progress(0, steps, epoch))


def run(gauges: Gauges, steps: range, signal: str) -> dict[int, float]:
    """The readings by the step that made them."""
    found: dict[int, float] = {}
    for step in steps:
        before = dict(gauges.sampled)
        gauges.sample(step, Numbers(float(step)), GROUPS)
        if gauges.sampled != before:
            assert gauges.sampled[signal] == step + 1
            found[step] = gauges.values[signal]["g0"]
    return found


def test_a_momentary_signal_is_taken_at_the_last_step_of_each_interval() -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("5st")))
    assert [s for s in range(20) if gauges.due(s)] == [4, 9, 14, 19]
    assert run(gauges, range(20), "gradient_l1") == {4: 4, 9: 9, 14: 14, 19: 19}


def test_the_last_steps_of_an_interval_are_gathered() -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("5st"), 2))
    assert [s for s in range(10) if gauges.due(s)] == [3, 4, 8, 9]
    assert run(gauges, range(10), "gradient_l1") == {4: 3.5, 9: 8.5}


@pytest.mark.parametrize("steps", [None, 5, 9])
def test_a_whole_interval_is_gathered(steps: int | None) -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("5st"), steps))
    assert all(gauges.due(s) for s in range(10))
    assert run(gauges, range(10), "gradient_l1") == {4: 2, 9: 7}


def test_a_reference_is_taken_at_the_first_step_and_read_from_the_next_on() -> None:
    gauges = gauges_for(Need("weight_delta_l1", EVERY("1st")))
    assert run(gauges, range(4), "weight_delta_l1") == {1: 1, 2: 3, 3: 5}


def test_changes_are_between_readings() -> None:
    gauges = gauges_for(Need("weight_delta_l1", EVERY("3st")))
    assert [s for s in range(9) if gauges.due(s)] == [0, 2, 5, 8]
    assert run(gauges, range(9), "weight_delta_l1") == {2: 4, 5: 25 - 4, 8: 64 - 25}


def test_intervals_in_epochs_follow_the_totals() -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("1ep")))
    assert list(run(gauges, range(30), "gradient_l1")) == [9, 19, 29]
    with pytest.raises(DurationError):
        Gauges((Need("gradient_l1", EVERY("1ep")),), Progress(0))


def test_a_window_starts_its_own_clock() -> None:
    need = Need("gradient_l1", EVERY("4st"), after=(EVERY("3st"), EVERY("2st")))
    assert list(run(gauges_for(need), range(15), "gradient_l1")) == [8, 12]
    need = Need("gradient_l1", EVERY("4st"), until=(EVERY("9st"),))
    assert list(run(gauges_for(need), range(20), "gradient_l1")) == [3, 7]


def test_percent_in_a_window_are_of_what_is_left() -> None:
    need = Need("gradient_l1", EVERY("50%"), after=(EVERY("20st"),))
    assert list(run(gauges_for(need), range(100), "gradient_l1")) == [59, 99]


def test_a_window_takes_its_reference_at_its_start_and_pretrained_ones_at_the_first_step() -> None:
    after = (EVERY("4st"),)
    late = gauges_for(Need("weight_delta_l1", EVERY("3st"), after=after))
    assert [s for s in range(10) if late.due(s)] == [4, 6, 9]
    first = gauges_for(Need("cka_pretrained", EVERY("3st"), after=after))
    assert [s for s in range(10) if first.due(s)] == [0, 6, 9]
    snapshot = gauges_for(Need("cka_snapshot", EVERY("3st"), after=after))
    assert [s for s in range(10) if snapshot.due(s)] == [4, 6, 9]


class Pictures(Numbers):
    """Activations that turn with the step: their cosine to an earlier one tells the distance."""

    def activations(self, unit: LayerGroup, *, int8: bool = False) -> Any:
        assert unit.calls
        angle = self.step * np.pi / 180
        return np.array([[np.cos(angle), np.sin(angle)]])


def angles(need: Need, steps: int) -> dict[int, int]:
    gauges, found = gauges_for(need), {}
    for step in range(steps):
        gauges.sample(step, Pictures(step), GROUPS)
        if gauges.sampled.get(need.signal) == step + 1:
            assert set(gauges.values[need.signal]) == {"g0", "g1"}  # the third never runs
            found[step] = round(np.degrees(np.arccos(gauges.values[need.signal]["g0"])))
    return found


def test_a_snapshot_is_refreshed_after_a_reading() -> None:
    kept = angles(Need("cosine_snapshot", EVERY("3st")), 12)
    assert kept == {2: 2, 5: 5, 8: 8, 11: 11}
    renewed = angles(Need("cosine_snapshot", EVERY("3st"), refresh=EVERY("6st")), 12)
    assert renewed == {2: 2, 5: 5, 8: 3, 11: 6}


def test_conflicting_requests_are_refused_unless_they_follow_each_other() -> None:
    one = Need("gradient_l1", EVERY("2st"))
    with pytest.raises(PolicyError, match=r"two ways to read it: every 3st .* and every 2st"):
        gauges_for(one, Need("gradient_l1", EVERY("3st")))
    first = Need("gradient_l1", EVERY("2st"), until=(EVERY("4st"),))
    second = Need("gradient_l1", EVERY("3st"), after=(EVERY("4st"),))
    assert list(run(gauges_for(first, second), range(12), "gradient_l1")) == [1, 3, 6, 9]


def test_equal_requests_are_served_once() -> None:
    need = Need("gradient_l1", EVERY("2st"))
    probe, gauges = Numbers(1), gauges_for(need, need)
    gauges.sample(1, probe, GROUPS)
    assert probe.asked == ["g0", "g1", "g2"]


def test_frozen_groups_are_gathered_only_on_request() -> None:
    frozen = frozenset({"g1"})
    gauges = gauges_for(Need("gradient_l1", EVERY("1st")))
    gauges.sample(0, Numbers(3, frozen), GROUPS)
    assert set(gauges.values["gradient_l1"]) == {"g0", "g2"}
    assert not gauges.wants_frozen(0)
    gauges = gauges_for(Need("gradient_l1", EVERY("2st"), frozen_too=True))
    gauges.sample(1, Numbers(3, frozen), GROUPS)
    assert set(gauges.values["gradient_l1"]) == {"g0", "g1", "g2"}
    assert [gauges.wants_frozen(s) for s in range(4)] == [False, True, False, True]


def test_values_per_parameter() -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("1st"), per="parameter"))
    gauges.sample(0, Numbers(3), GROUPS)
    assert gauges.values["gradient_l1"] == {"g0.w": 3, "g1.w": 3, "g2.w": 3}


def test_static_signals_are_read_once_and_first() -> None:
    gauges = gauges_for(Need("spectral_snr", None))
    assert gauges.due(0) == []
    gauges.read_static(Numbers(0), GROUPS)
    assert set(gauges.values["spectral_snr"]) == {"g0", "g1", "g2"}
    assert gauges.sampled == {"spectral_snr": 0}
    assert gauges.seconds["spectral_snr"] > 0


def test_supplied_signals_are_taken_as_they_are_given() -> None:
    gauges = gauges_for(Need("probe_behind", None))
    gauges.read_static(Numbers(0), GROUPS, {"probe_behind": {"g2": 0.5, "g0": -0.1}, "other": {}})
    assert gauges.values == {"probe_behind": {"g0": -0.1, "g2": 0.5}}
    gauges.read_static(Numbers(0), GROUPS)
    assert gauges.values == {"probe_behind": {}}


def test_each_signal_is_charged_its_own_time() -> None:
    gauges = gauges_for(Need("gradient_l1", EVERY("1st")), Need("weight_delta_l1", EVERY("3st")))
    assert gauges.seconds == {}
    gauges.sample(1, Numbers(1), GROUPS)
    assert set(gauges.seconds) == {"gradient_l1"}
    once = gauges.seconds["gradient_l1"]
    gauges.sample(2, Numbers(2), GROUPS)
    assert set(gauges.seconds) == {"gradient_l1", "weight_delta_l1"}
    assert gauges.seconds["gradient_l1"] > once > 0


# -- steps without an update -----------------------------------------------------------------


def test_a_step_without_an_update_is_not_gathered() -> None:
    gauges = gauges_for(Need("summed_gradient_l1", EVERY("3st"), None))
    gauges.sample(0, Numbers(1), GROUPS)
    gauges.sample(1, Numbers(float("inf")), GROUPS, gather=False)
    gauges.sample(2, Numbers(5), GROUPS)
    assert gauges.values["summed_gradient_l1"]["g0"] == 6


def test_an_interval_that_ends_without_an_update_reads_what_there_is() -> None:
    gauges = gauges_for(Need("summed_gradient_l1", EVERY("2st"), None))
    gauges.sample(0, Numbers(4), GROUPS)
    gauges.sample(1, Numbers(float("nan")), GROUPS, gather=False)
    assert gauges.values["summed_gradient_l1"]["g0"] == 4
    lone = gauges_for(Need("gradient_l1", EVERY("2st")))
    lone.sample(1, Numbers(float("nan")), GROUPS, gather=False)
    assert lone.values == lone.sampled == {}  # nothing new: the policy sees no reading


def test_a_reference_is_taken_even_in_a_step_without_an_update() -> None:
    """The first updates of mixed precision are often skipped, while its scale settles."""
    gauges = gauges_for(Need("weight_delta_l1", EVERY("2st")))
    gauges.sample(0, Numbers(0), GROUPS, gather=False)
    gauges.sample(1, Numbers(1), GROUPS)
    assert gauges.values["weight_delta_l1"]["g0"] == 1


# -- resume ----------------------------------------------------------------------------------

REMEMBERING = [
    Need("gradient_l1", EVERY("4st"), 3),
    Need("summed_gradient_norm", EVERY("5st"), None),
    Need("weight_delta_norm", EVERY("3st")),
    Need("gradient_change_l1", EVERY("2st")),
    Need("fisher", EVERY("6st"), 4),
    Need("update_importance", EVERY("7st"), None),
]


@pytest.mark.parametrize("stop", range(1, 14))
def test_interrupted_in_any_step_reads_the_same(stop: int) -> None:
    whole, first, second = (gauges_for(*REMEMBERING) for _ in range(3))
    for step in range(15):
        whole.sample(step, Numbers(step), GROUPS)
        (first if step < stop else second).sample(step, Numbers(step), GROUPS)
        if step == stop - 1:
            second.restore(copy.deepcopy(first.state()), GROUPS)
    assert (second.values, second.sampled) == (whole.values, whole.sampled)
    assert repr(second.state()) == repr(whole.state())


def test_a_state_is_a_copy() -> None:
    gauges = gauges_for(Need("summed_gradient_l1", EVERY("9st"), None))
    gauges.sample(0, Numbers(1), GROUPS)
    state = gauges.state()
    text = repr(state)
    other = gauges_for(Need("summed_gradient_l1", EVERY("9st"), None))
    other.restore(state, GROUPS)
    for each in (gauges, other):
        each.sample(1, Numbers(2), GROUPS)
    assert repr(state) == text


def test_values_keep_the_order_of_the_groups_whatever_a_file_did_to_it() -> None:
    """Policies break ties by order; a resumed run must break them alike."""
    groups = LayerGroups(
        tuple(LayerGroup(n, i, (TensorInfo(f"{n}.w"),)) for i, n in enumerate(("stem", "body")))
    )
    for per in ("group", "parameter"):
        gauges = gauges_for(Need("gradient_l1", EVERY("1st"), per=per))
        gauges.sample(0, Numbers(1), groups)
        again = gauges_for(Need("gradient_l1", EVERY("1st"), per=per))
        again.restore(json.loads(json.dumps(gauges.state(), sort_keys=True)), groups)
        assert list(again.values["gradient_l1"]) == list(gauges.values["gradient_l1"])


def test_static_requests_per_group_and_per_parameter_are_refused() -> None:
    """The values of one would take the place of the other's."""
    needs = [Need("spectral_snr", None, per=per) for per in ("group", "parameter")]
    with pytest.raises(PolicyError, match=r"once per parameter and once per group"):
        gauges_for(*needs)
    assert len(gauges_for(needs[0], needs[0]).static) == 1


def test_a_window_in_steps_has_a_clock_of_what_is_left() -> None:
    assert window((), Progress(7, 100, 10)) == (0, Progress(0, 100, 10))
    lengths = (EVERY("2ep"), EVERY("50%"))
    assert window(lengths, Progress(7, 100, 10)) == (60, Progress(0, 40, 10))


def test_what_a_closed_window_remembered_is_dropped() -> None:
    """A driver calls `forget` at every step: copies of all weights must not outlive their use."""
    need = Need("weight_delta_l1", EVERY("2st"), until=(EVERY("4st"),))
    gauges = gauges_for(need)
    for step in range(4):
        gauges.sample(step, Numbers(float(step)), GROUPS)
        gauges.forget(step)
    assert gauges.state()["memory"][0]["g0"]
    gauges.forget(4)
    assert not any(gauges.state()["memory"])
    assert gauges.values["weight_delta_l1"]  # the last reading stays
