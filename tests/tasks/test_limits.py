"""Budgets in seconds and bytes: what `fit` foretells, what `auto` freezes for it, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import frostline
import tiny_task
from faulty_disk import QuickDisk, use_disk
from frostline.backends.torch.grouping import layer_groups
from frostline.backends.torch.measure import measure_costs
from frostline.errors import ConfigError
from frostline.frontier.trial import memory_in_use
from frostline.groups import LayerGroups
from frostline.tasks.config import RunConfig, budget_bytes, load_config
from frostline.tasks.foretell import foretell_limits
from frostline.tasks.setup import build_policy
from frostline.tasks.task import Task, load_task

SETTINGS: dict[str, Any] = tiny_task.RUN | {"policy": "auto", "epochs": 2, "device": "cpu"}
CPU = torch.device("cpu")
TIMES = {"first_epoch_from_s", "epoch_from_s"}
FULL = "within:policy=(full)"


@pytest.fixture(autouse=True)
def _quick_disk():
    with use_disk(QuickDisk()):
        yield


def fitted(place: Path, **changed: Any) -> frostline.Run:
    return frostline.fit(**(SETTINGS | changed), output=place / "run", cache_dir=place / "stores")


def measured(task: Task) -> LayerGroups:
    """Its layer groups, with costs as of two samples."""
    example = task.example(2)
    return measure_costs(task.model, layer_groups(task.model, example, head=task.head), example)


def foretold_of(run: frostline.Run) -> dict[str, Any]:
    return dict(run.record.first_look.get("costs", {}).get("foretold", {}))


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), (" 1.5 MB ", 1_500_000), ("800 kib", 800 * 1024)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    config = load_config(None, {**SETTINGS, "memory_budget": text})
    assert config.memory_budget == text.strip()
    assert budget_bytes(config) == size
    assert budget_bytes(RunConfig(**SETTINGS)) is None


@pytest.mark.parametrize("text", ["", "0GiB", "-1MB", "much", "2 parsecs", "infGB"])
def test_what_is_no_size_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        load_config(None, {**SETTINGS, "memory_budget": text})


@pytest.mark.parametrize(
    ("text", "seconds"), [("10min", "600s"), ("1.5 h", "5400s"), ("2MIN", "120s")]
)
def test_minutes_and_hours_are_seconds(text: str, seconds: str) -> None:
    assert load_config(None, {**SETTINGS, "budget": text}).budget == seconds


def test_limits_reach_the_policy_that_keeps_to_some() -> None:
    limits = {"budget": "1min", "memory_budget": "1KiB"}
    policy = build_policy(RunConfig(**SETTINGS, **limits))
    assert (policy.run_s, policy.peak_bytes) == (60.0, 1024)  # type: ignore[attr-defined]
    own = build_policy(RunConfig(**SETTINGS | {"policy": "auto:run_s=5"}, **limits))
    assert (own.run_s, own.peak_bytes) == (5.0, 1024)  # type: ignore[attr-defined]
    assert build_policy(RunConfig(**SETTINGS, budget="50st")).run_s is None  # type: ignore[attr-defined]


def test_a_memory_budget_with_a_policy_that_heeds_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"within:policy=\(full\)"):
        fitted(tmp_path, policy="full", memory_budget="1GiB")
    assert not (tmp_path / "run" / "summary.json").exists()


# -- what is foretold --------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["off", "on"])
def test_every_depth_is_foretold_and_the_model_is_left_as_it_was(cache: str) -> None:
    torch.manual_seed(0)
    task = load_task(RunConfig(**SETTINGS, cache=cache))
    groups = measured(task)
    before = {name: t.clone() for name, t in task.model.state_dict().items()}
    stream = torch.get_rng_state()
    found = foretell_limits(
        task, task.model, groups, CPU, measured_samples=2, times=True, most_bytes=None
    )
    assert set(found.signals) == TIMES | {"peak_from_bytes"}
    first_head = next(g.depth for g in groups if g.name in groups.head)
    for values in found.signals.values():
        assert list(values) == list(groups.names[: first_head + 1])
        assert all(value > 0 for value in values.values())
    later, first = found.signals["epoch_from_s"], found.signals["first_epoch_from_s"]
    assert (later == first) is (cache == "off")
    assert found.spent_s > 0
    assert (found.peak_bytes or 0) > 2**20
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[n], t) for n, t in task.model.state_dict().items())


def test_steps_that_would_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.frontier import foretell as module

    tried: list[int] = []
    plain = module._Found.plain

    def noted(self: Any, depth: int) -> None:
        tried.append(depth)
        plain(self, depth)

    monkeypatch.setattr(module._Found, "plain", noted)
    task = load_task(RunConfig(**SETTINGS))
    groups = measured(task)
    deepest = next(g.depth for g in groups if g.name in groups.head)
    for most, expected in ((None, [deepest, 0]), (1.0, [deepest])):
        tried.clear()
        found = foretell_limits(
            task, task.model, groups, CPU, measured_samples=2, times=False, most_bytes=most
        )
        assert tried == expected
        assert set(found.signals) == {"peak_from_bytes"}
        assert len(found.signals["peak_from_bytes"]) == deepest + 1


@pytest.mark.parametrize(("most_s", "samples"), [(None, 16), (1e9, 16), (1e-9, 4)])
def test_where_time_is_short_steps_take_fewer_samples(
    most_s: float | None, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.tasks import foretell as module

    sizes: list[int] = []
    real = module.foretell_steps

    def seen(model: Any, groups: Any, example: Any, *rest: Any, **options: Any) -> Any:
        found = real(model, groups, example, *rest, **options)
        sizes.append(found.batch_size)
        return found

    monkeypatch.setattr(module, "foretell_steps", seen)
    task = load_task(RunConfig(**SETTINGS))
    groups = measured(task)
    foretell_limits(task, task.model, groups, CPU, measured_samples=2, times=True, most_s=most_s)
    assert sizes == [samples]


def test_steps_that_the_device_has_no_room_for_leave_those_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from frostline.frontier import foretell as module

    plain = module._Found.plain

    def short(self: Any, depth: int) -> None:
        if depth == 0:
            raise torch.OutOfMemoryError("no room")
        plain(self, depth)

    monkeypatch.setattr(module._Found, "plain", short)
    task = load_task(RunConfig(**SETTINGS))
    groups = measured(task)
    found = foretell_limits(
        task, task.model, groups, CPU, measured_samples=2, times=True, most_bytes=None
    )
    seconds = list(found.signals["epoch_from_s"].values())
    assert len(seconds) > 2
    assert seconds[0] > seconds[-1] > 0


# -- whole runs --------------------------------------------------------------------------------


def test_without_limits_nothing_is_foretold(tmp_path: Path) -> None:
    assert foretold_of(fitted(tmp_path)) == {}


def test_plenty_changes_nothing_but_what_is_said(tmp_path: Path) -> None:
    plain = fitted(tmp_path / "plain")
    rich = fitted(tmp_path / "rich", budget="1h", memory_budget="900GiB")
    assert set(foretold_of(rich)) == TIMES | {"peak_from_bytes"}
    for one, other in zip(plain.record.decisions, rich.record.decisions, strict=True):
        assert one.plan == other.plan
    assert "the run is expected to take" in rich.record.decisions[0].plan.reason
    assert plain.summary["val_loss"] == rich.summary["val_loss"]
    assert rich.summary["first_look_s"] > 0


@pytest.mark.parametrize("limit", [{"budget": "0.001s"}, {"memory_budget": "1KiB"}])
def test_where_nothing_fits_the_head_alone_trains(limit: dict[str, str], tmp_path: Path) -> None:
    run = fitted(tmp_path, policy=FULL, **limit)
    first = run.record.decisions[0].plan
    assert len(first.frozen) == len(run.record.header["groups"]) - len(run.record.header["head"])
    assert "and still too much" in first.reason
    assert run.summary["certificate_ok"]


def test_a_short_time_has_room_for_a_short_look(tmp_path: Path) -> None:
    run = fitted(tmp_path, budget="0.001s")
    [note] = [n for n in run.record.first_look["notes"] if "time budget" in n]
    assert note == "a look at 12 of 49 training samples: the time budget has no room for more"
    assert not fitted(tmp_path / "rich", budget="1h").record.first_look["notes"]


def test_less_memory_freezes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With figures of our own: what a process has in use beside a tiny model hides its growth."""
    from frostline.tasks import session as module

    real = module.foretell_limits

    def known(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        names = list(found.signals["peak_from_bytes"])
        peaks = {name: (len(names) - i) * 2.0**20 for i, name in enumerate(names)}
        return type(found)({"peak_from_bytes": peaks}, found.spent_s, found.peak_bytes)

    monkeypatch.setattr(module, "foretell_limits", known)
    groups = len(fitted(tmp_path / "a", policy=FULL).record.header["groups"])
    for room in range(1, groups + 1):
        place = tmp_path / str(room)
        run = fitted(place, policy=FULL, memory_budget=f"{room}MiB", epochs=1)
        assert len(run.record.decisions[0].plan.frozen) == groups - room


def test_a_system_that_does_not_tell_its_memory_refuses_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.frontier import trial
    from frostline.tasks import foretell

    for module in (trial, foretell):
        monkeypatch.setattr(module, "memory_in_use", lambda device: None)
    with pytest.raises(ConfigError, match="leave out the memory budget"):
        fitted(tmp_path, memory_budget="1GiB")


def test_a_paused_run_keeps_what_was_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.tasks import session as module

    calls: list[int] = []
    real = module.foretell_limits

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(module, "foretell_limits", counted)
    limits = {"budget": "1h", "memory_budget": "900GiB", "epochs": 3}
    paused = fitted(tmp_path, **limits, pause_after=1)
    decided = [d.plan for d in paused.record.decisions]
    whole = fitted(tmp_path, **limits)
    assert calls == [1]
    assert whole.summary["epochs_run"] == 3
    assert [d.plan for d in whole.record.decisions][: len(decided)] == decided
    assert whole.summary["peak_memory_bytes"] >= paused_peak(whole)


def paused_peak(run: frostline.Run) -> float:
    return max(line["costs"]["peak_memory_bytes"] for line in run.record.epochs)


def test_memory_in_use_is_known_here() -> None:
    before = memory_in_use(CPU)
    held = torch.ones(2**24)
    after = memory_in_use(CPU)
    assert before
    assert after
    assert after - before > 2**25
    del held
