"""Phases: when they change, what trains in each, what the weights are then, and bad files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.clock import Duration, Progress
from frostline.compose import Live, Then, Union
from frostline.driver import Driver
from frostline.errors import DurationError, PolicyError, StorageError
from frostline.groups import LayerGroup, LayerGroups, TensorInfo
from frostline.phase_file import MAX_BYTES, Phase, PhaseList
from frostline.plan import FreezePlan
from frostline.policies.phases import ChainThaw, FineTune, LpFt, Phases, ends_its_phase
from frostline.policies.static import Full
from frostline.policy import Event, EventKind, Policy
from frostline.registry import make_policy, policy_text
from frostline.testing import check_policy, example_groups
from numpy_case import NumpyCase, copy_into

GROUPS = example_groups(4)  # block0, block1, block2, head
D = Duration.parse
PER_EPOCH, TOTAL = 2, 20


class Run:
    """Asks a policy as a driver would; `losses` are what the evaluations come out as."""

    def __init__(self, policy: Policy, total: int | None = TOTAL) -> None:
        self.policy, self.total = policy, total
        self.step, self.state = 0, policy.init(GROUPS)
        self.plan = self.ask(EventKind.START)

    def ask(self, kind: EventKind, **metrics: float) -> FreezePlan:
        progress = Progress(self.step, self.total, PER_EPOCH)
        event = Event(kind, progress, metrics=metrics)
        self.plan, state = self.policy.decide(GROUPS, self.state, event)
        self.state = json.loads(json.dumps(state, allow_nan=False))
        return self.plan

    def epoch(self, value: float, name: str = "val_loss") -> FreezePlan:
        for _ in range(PER_EPOCH):
            self.ask(EventKind.STEP)
            self.step += 1
        return self.ask(EventKind.EVALUATED, **{name: value})

    @property
    def trains(self) -> set[str]:
        return trained(self.plan)


def trained(plan: FreezePlan) -> set[str]:
    return {g.name for g in GROUPS if plan.trains(g)}


def phases(*given: Phase) -> Phases:
    return Phases(PhaseList(given))


# -- a whole sequence by hand --------------------------------------------------------------------


def test_a_whole_sequence_worked_by_hand() -> None:
    policy = phases(
        Phase("head", length=D("3st"), restore_best=True),
        Phase("last 2 groups", patience=2, lr=0.5),
        Phase("block0", add=True, until=D("80%"), patience=9),
        Phase("all", patience=1, metric="val_accuracy", mode="max", restore_best=True),
    )
    asked = [  # kind, step, metrics, what trains then, the phase
        ("start", 0, {}, {"head"}, 0),
        ("step", 0, {}, {"head"}, 0),
        ("step", 1, {}, {"head"}, 0),
        ("evaluated", 2, {"val_loss": 1.0}, {"head"}, 0),
        ("step", 2, {}, {"head"}, 0),
        ("step", 3, {}, {"head"}, 0),  # three steps are over, but it goes back to its best
        ("evaluated", 4, {"val_loss": 3.0}, {"block2", "head"}, 1),
        ("step", 4, {}, {"block2", "head"}, 1),
        ("evaluated", 6, {"val_loss": 3.0}, {"block2", "head"}, 1),  # the best of this phase
        ("evaluated", 8, {"val_loss": 3.0}, {"block2", "head"}, 1),  # equal is not better
        ("step", 8, {}, {"block2", "head"}, 1),
        ("evaluated", 10, {"val_loss": math.nan}, {"block0", "block2", "head"}, 2),
        ("evaluated", 12, {"val_loss": 9.0}, {"block0", "block2", "head"}, 2),
        ("step", 15, {}, {"block0", "block2", "head"}, 2),
        ("step", 16, {}, set(GROUPS.names), 3),  # 80 % of 20
        ("evaluated", 16, {"val_accuracy": 0.5}, set(GROUPS.names), 3),
        ("evaluated", 18, {"val_accuracy": 0.6}, set(GROUPS.names), 3),
        ("evaluated", 20, {"val_accuracy": 0.6}, set(GROUPS.names), 4),
    ]
    state: Any = policy.init(GROUPS)
    plan = FreezePlan()
    for kind, step, metrics, trains, phase in asked:
        event = Event(EventKind(kind), Progress(step, TOTAL, PER_EPOCH), metrics=metrics)
        plan, state = policy.decide(GROUPS, state, event)
        assert (trained(plan), plan.phase) == (trains, phase), (kind, step)
        assert plan.done == (phase == 4)
        assert plan.keep_best == {0: "min val_loss", 3: "max val_accuracy"}.get(phase, "")
    assert "val_accuracy not better than 0.6 in 1 evaluations" in plan.reason


def test_rates_of_groups_that_trained_before_stay_when_others_join() -> None:
    run = Run(phases(Phase("head", length=D("1ep"), lr=0.5), Phase("block2", add=True, lr=0.1)))
    run.epoch(1.0)
    assert dict(run.plan.lr_scale) == {"head": 0.5, "block2": 0.1}


def test_parts_of_a_group_may_train_and_others_join_later() -> None:
    run = Run(phases(Phase("kind:bias", length=D("1ep"), lr=0.5), Phase("block1", add=True, lr=2)))
    assert run.plan.exempt["block1"] == {"block1.bias"}
    run.epoch(1.0)
    assert run.trains == set(GROUPS.names)
    assert "block1" not in run.plan.frozen
    assert run.plan.exempt["block0"] == {"block0.bias"}
    assert set(run.plan.lr_scale.values()) == {0.5}  # that of the phase in which a group joined


def test_improvement_must_exceed_min_delta() -> None:
    run = Run(phases(Phase("head", patience=1, min_delta=0.25), Phase("all")))
    run.epoch(1.0)
    run.epoch(0.5)  # better by 0.5
    assert run.plan.phase == 0
    run.epoch(0.25)  # by exactly min_delta: not more
    assert run.plan.phase == 1


def test_nothing_but_nan_ends_a_phase_too() -> None:
    """A metric that is no number must neither count as improvement nor hold a phase for ever."""
    run = Run(phases(Phase("head", patience=2), Phase("all")))
    assert run.epoch(math.nan).phase == 0
    run.epoch(math.inf)
    assert run.plan.phase == 1
    assert "any number" in run.plan.reason


def test_an_infinite_metric_is_no_best_for_max() -> None:
    run = Run(phases(Phase("head", patience=1, metric="a", mode="max"), Phase("all")))
    run.epoch(math.inf, "a")
    assert run.plan.phase == 1


def test_a_phase_that_begins_after_its_until_lasts_one_epoch() -> None:
    run = Run(phases(Phase("head", length=D("3ep")), Phase("block2", until=D("1ep")), Phase("all")))
    seen = [run.epoch(1.0).phase for _ in range(5)]
    assert seen == [0, 0, 1, 2, 2]
    late = Run(
        phases(Phase("head", length=D("1ep")), Phase("block2", until=D("1st")), Phase("all"))
    )
    late.epoch(1.0)
    late.step += 1
    assert late.ask(EventKind.STEP).phase == 1  # in the middle of its epoch


def test_the_first_end_that_comes_ends_a_phase() -> None:
    for first in (Phase("head", length=D("2ep"), until=D("50%")),
                  Phase("head", length=D("90%"), until=D("4st"))):  # fmt: skip
        run = Run(phases(first, Phase("all")))
        assert [run.epoch(1.0).phase for _ in range(3)] == [0, 1, 1]


def test_boundaries_are_exact_when_the_policy_is_asked_late() -> None:
    policy = phases(Phase("head", length=D("3st")), Phase("block0", length=D("3st")), Phase("all"))
    state: Any = policy.init(GROUPS)
    plan, state = policy.decide(GROUPS, state, Event(EventKind.START, Progress(0)))
    plan, state = policy.decide(GROUPS, state, Event(EventKind.STEP, Progress(5)))
    assert plan.phase == 1
    assert state["end"] == 6  # not 8
    plan, state = policy.decide(GROUPS, state, Event(EventKind.STEP, Progress(50)))
    assert plan.phase == 2


def test_patience_is_judged_only_at_evaluations_and_by_its_own_phase() -> None:
    """The evaluation that ends one phase says nothing about the next."""
    run = Run(phases(Phase("head", patience=1), Phase("block0", patience=1), Phase("all")))
    run.epoch(1.0)
    run.epoch(2.0)
    assert run.plan.phase == 1
    run.epoch(5.0)  # worse than ever, and the best of this phase
    assert run.plan.phase == 1


def test_a_metric_that_is_missing_is_named() -> None:
    run = Run(phases(Phase("head", patience=1), Phase("all")))
    with pytest.raises(PolicyError, match="val_loss"):
        run.epoch(1.0, "loss")


def test_unknown_totals_are_noticed_at_the_start() -> None:
    with pytest.raises(DurationError, match="total_steps is unknown"):
        Run(phases(Phase("head", length=D("1ep")), Phase("all", length=D("30%"))), total=None)


def test_the_contract_holds_inside_other_policies() -> None:
    for policy in (Live(LpFt()), Then(Full(), D("1ep"), ChainThaw(patience=1)), Union((LpFt(),))):
        check_policy(policy)


# -- the recipes ---------------------------------------------------------------------------------


def test_chain_thaw_goes_head_then_each_layer_front_to_back_then_all() -> None:
    run = Run(ChainThaw(patience=2, head_lr=10.0), total=None)
    seen = [frozenset(run.trains)]
    rates = [dict(run.plan.lr_scale)]
    while not run.plan.done:
        assert run.plan.keep_best == "min val_loss"
        before = run.plan.phase
        evaluations = 0
        while run.plan.phase == before:
            run.epoch(1.0)
            evaluations += 1
        assert evaluations == 3  # the best one, and two that are not better
        seen.append(frozenset(run.trains))
        rates.append(dict(run.plan.lr_scale))
    everything = frozenset(GROUPS.names)
    alone = [frozenset({name}) for name in ("head", "block0", "block1", "block2")]
    assert seen == [*alone, everything, everything]
    assert rates == [{"head": 10.0}, {}, {}, {}, {}, {}]
    assert run.plan.keep_best == ""


def test_chain_thaw_has_the_published_patience() -> None:
    assert all(p.patience == 5 and p.restore_best for p in ChainThaw().phases(GROUPS))


def test_lp_ft_changes_at_the_half_of_the_run() -> None:
    run = Run(LpFt(lr=0.1))
    seen = [run.epoch(1.0).phase for _ in range(10)]
    assert seen == [0] * 4 + [1] * 6  # the fifth evaluation is that of step 10
    assert run.trains == set(GROUPS.names)
    assert set(run.plan.lr_scale.values()) == {0.1}
    assert not run.plan.done


def test_lp_ft_may_end_probing_on_a_plateau() -> None:
    run = Run(LpFt(patience=2))
    assert [run.epoch(v).phase for v in (1.0, 0.9, 0.9, 0.9)] == [0, 0, 0, 1]


def test_fine_tune_has_the_rates_of_fastai() -> None:
    run = Run(FineTune())
    assert run.trains == {"head"}
    assert run.plan.lr_scale == {}
    run.epoch(1.0)
    # numpy's geomspace is what fastai's even_mults computes: base/2/100 ... base/2.
    wanted = np.geomspace(0.5 / 100, 0.5, 4)
    assert [run.plan.lr_scale[n] for n in GROUPS.names] == pytest.approx(list(wanted))


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("chain-thaw:patience=0", "patience below 1"),
        ("chain-thaw:head_lr=0", "above 0"),
        ("chain-thaw:min_delta=-1", "0 or more"),
        ("chain-thaw:length=0ep", "no time"),
        ("lp-ft:probe=0%", "no time"),
        ("lp-ft:lr=0", "above 0"),
        ("fine-tune:spread=inf", "above 0"),
        ("phases:file=no-such-file.yaml", "No such file"),
        ("phases:file=x,lr=0", "above 0"),
        ("phases", "file"),
    ],
)
def test_bad_options_are_refused(spec: str, found: str) -> None:
    with pytest.raises(PolicyError, match=found):
        make_policy(spec)


def test_the_end_of_a_phase_is_known_through_wrappers() -> None:
    first, last = FreezePlan(phase=0), FreezePlan(phase=1)
    assert ends_its_phase(Live(LpFt()), GROUPS, first)
    assert not ends_its_phase(Live(LpFt()), GROUPS, last)
    assert not ends_its_phase(Full(), GROUPS, first)
    assert ends_its_phase(Union((Full(), LpFt())), GROUPS, first)
    assert ends_its_phase(Then(Full(), D("1ep"), LpFt()), GROUPS, first)
    assert ends_its_phase(ChainThaw(), GROUPS, FreezePlan(phase=4))
    assert not ends_its_phase(ChainThaw(), GROUPS, FreezePlan(phase=5))


# -- weights at a change of phase ----------------------------------------------------------------


def bits(case: NumpyCase) -> dict[str, bytes]:
    return {n: a.tobytes() for n, a in (case.net.parameters | case.net.buffers).items()}


def driven(case: NumpyCase, policy: Policy) -> Driver:
    return Driver(policy, case.backend, total_steps=40, steps_per_epoch=4)


def one_epoch(case: NumpyCase, driver: Driver, loss: float) -> None:
    for _ in range(4):
        with driver.step():
            case.backward()
            case.update()
    driver.evaluated({"val_loss": loss})


RESTORING = Phases(
    PhaseList(
        (
            Phase("last 2 groups", patience=2, restore_best=True),
            Phase("layer0", patience=1, restore_best=True),
            Phase("all"),
        )
    )
)


def test_training_goes_on_from_the_best_weights_with_a_fresh_optimizer() -> None:
    """Others keep the worse weights at the end of a phase, or the momentum that led there."""
    case = NumpyCase()
    driver = driven(case, RESTORING)
    one_epoch(case, driver, 1.0)
    one_epoch(case, driver, 0.5)
    best = bits(case)
    one_epoch(case, driver, 0.7)
    assert bits(case) != best
    one_epoch(case, driver, 0.5)
    assert driver.plan.phase == 1
    assert bits(case) == best
    assert case.optimizer.velocity == {}

    one_epoch(case, driver, 3.0)  # the best of *this* phase, though worse than that of the last
    best = bits(case)
    one_epoch(case, driver, 4.0)
    assert driver.plan.phase == 2
    assert bits(case) == best
    assert case.optimizer.velocity == {}
    one_epoch(case, driver, 1.0)

    spans = {(h.tensor, h.from_step, h.to_step) for h in driver.finish().holds}
    assert ("layer0.weight", 0, 16) in spans  # frozen in the first phase only
    assert ("layer1.weight", 0, 24) in spans  # held over the change, with the same bits
    assert ("head.weight", 16, 24) in spans


def test_a_phase_goes_back_to_no_weights_older_than_its_end() -> None:
    """Between two evaluations, a return to the best would throw away what was learned since."""
    case = NumpyCase()
    phase = Phase("last 2 groups", length=D("6st"), restore_best=True)
    driver = driven(case, Phases(PhaseList((phase, Phase("all")))))
    one_epoch(case, driver, 1.0)
    one_epoch(case, driver, 0.5)  # six steps were over in the middle of this epoch
    assert (driver.plan.phase, driver.progress.step) == (1, 8)
    short = driven(NumpyCase(), Phases(PhaseList((replace(phase, length=D("2st")), Phase("all")))))
    with short.step():
        pass
    with short.step():
        pass
    with short.step() as plan:
        assert plan.phase == 1  # never evaluated: there is nothing to go back to


def test_no_momentum_of_an_earlier_phase_is_left_when_its_end_saw_no_evaluation() -> None:
    """State that survives unseen while a layer is frozen pushes it when it trains again."""
    case = NumpyCase()
    driver = driven(case, ChainThaw(length=D("3st")))
    for _ in range(4):
        with driver.step():
            case.backward()
            case.update()
    assert driver.plan.released == driver.plan.frozen
    assert {n.partition(".")[0] for n in case.optimizer.velocity} == {"layer0"}


def test_everything_trains_in_the_last_phase() -> None:
    """Layers frozen when the optimizer was made are left out of it by others, and never train."""
    case = NumpyCase()
    driver = driven(case, ChainThaw(patience=1))
    while driver.plan.phase < 5 or len(driver.decisions) < 5:
        one_epoch(case, driver, 1.0)
        if driver.plan.phase == 5:
            break
    before = bits(case)
    one_epoch(case, driver, 0.5)
    assert all(before[n] != now for n, now in bits(case).items())


def test_without_restoring_the_optimizer_remembers_what_goes_on_training() -> None:
    case = NumpyCase()
    driver = driven(case, FineTune())
    one_epoch(case, driver, 1.0)
    assert driver.plan.phase == 1
    assert {n.partition(".")[0] for n in case.optimizer.velocity} == {"head"}


LOSSES = [1.0, 0.5, 0.7, 0.6, 2.0, 3.0, 0.4, 0.3]


@pytest.mark.parametrize("stop", range(1, 8))
def test_resumed_in_any_phase_equals_uninterrupted(stop: int) -> None:
    whole = NumpyCase()
    driver = driven(whole, RESTORING)
    for loss in LOSSES:
        one_epoch(whole, driver, loss)
    first = NumpyCase()
    begun = driven(first, RESTORING)
    for loss in LOSSES[:stop]:
        one_epoch(first, begun, loss)
    again = NumpyCase()
    copy_into(again, first)
    resumed = driven(again, RESTORING)
    resumed.restore(begun.state())
    for loss in LOSSES[stop:]:
        one_epoch(again, resumed, loss)
    assert bits(again) == bits(whole)
    assert again.evidence() == whole.evidence()
    assert resumed.finish().to_json() == driver.finish().to_json()


# -- files ---------------------------------------------------------------------------------------


def written(folder: Path, text: str | bytes, **options: Any) -> Phases:
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return Phases(str(path), **options)


OWN = """\
phases:
  - train: head
    length: 2ep
  - add: [block2, "kind:bias & block1"]
    metric: val_accuracy
    mode: max
    patience: 3
    min_delta: 1e-3
    lr: 0.5
  - train: all
    until: 100%
    restore_best: false
    spread: 10
"""


def test_our_own_form(tmp_path: Path) -> None:
    assert written(tmp_path, OWN).phases(GROUPS) == (
        Phase("head", length=D("2ep")),
        Phase(
            "block2 | kind:bias & block1",
            add=True,
            metric="val_accuracy",
            mode="max",
            patience=3,
            min_delta=1e-3,
            restore_best=True,
            lr=0.5,
        ),
        Phase("all", until=D("100%"), spread=10.0),
    )


def test_the_metric_of_the_policy_is_for_phases_without_one(tmp_path: Path) -> None:
    text = "phases:\n- train: head\n  patience: 2\n- train: all\n  metric: loss\n  patience: 1\n"
    first, second = written(tmp_path, text, metric="f1", mode="max").phases(GROUPS)
    assert (first.metric, first.mode) == ("f1", "max")
    assert (second.metric, second.mode) == ("loss", "min")


def test_the_short_form_names_the_file_and_the_repr_holds_the_content(tmp_path: Path) -> None:
    policy = written(tmp_path, OWN)
    path = tmp_path / "plan.yaml"
    assert policy_text(policy) == f"phases:file={path}"
    assert make_policy(policy_text(policy)) == policy
    assert "min_delta=0.001" in repr(policy)


def test_a_changed_file_is_noticed_on_resume(tmp_path: Path) -> None:
    case = NumpyCase()
    text = "phases:\n- train: head\n  length: 2ep\n- train: all\n"
    driver = driven(case, written(tmp_path, text))
    one_epoch(case, driver, 1.0)
    again = NumpyCase()
    copy_into(again, case)
    with pytest.raises(StorageError, match="written under"):
        driven(again, written(tmp_path, text.replace("2ep", "3ep"))).restore(driver.state())
    driven(again, written(tmp_path, "# a comment changes nothing\n" + text)).restore(driver.state())


FTS = """\
0:
  params:
  - model.head.bias
  - model.head.weight
  max_transition_epoch: 3
1:
  params: # an expression matches the beginning of a name
  - model.block2.*
2:
  params:
  - model.block[01].(norm|bias)
  max_transition_epoch: -1
  lr: 1.0e-05
"""


def test_a_schedule_for_finetuning_scheduler_is_taken_over(tmp_path: Path) -> None:
    run = Run(written(tmp_path, FTS, strip="model.", lr=1e-4))
    assert run.trains == {"head"}
    assert run.plan.keep_best == "min val_loss"
    assert [run.epoch(v).phase for v in (3.0, 2.0, 1.0)] == [0, 0, 1]  # the third epoch is over
    assert run.trains == {"block2", "head"}
    assert [run.epoch(v).phase for v in (1.0, 1.0, 1.0, 1.0)] == [1, 1, 1, 2]  # patience of 3
    assert run.plan.exempt["block0"] == {"block0.norm.weight", "block0.bias"}
    assert run.plan.exempt["block1"] == {"block1.norm.weight", "block1.bias"}
    assert dict(run.plan.lr_scale) == pytest.approx({"block0": 0.1, "block1": 0.1})
    for _ in range(4):
        run.epoch(1.0)
    assert run.plan.done


def test_a_name_means_that_parameter_and_no_longer_one(tmp_path: Path) -> None:
    """As an expression, "block0.norm.weight" would match the beginning of longer names, too."""
    tensors = (TensorInfo("a.weight", (2,)), TensorInfo("a.weight_g", (2,)))
    groups = LayerGroups((LayerGroup("a", 0, tensors), LayerGroup("b", 1, (TensorInfo("b.w"),))))
    named = written(tmp_path, "0:\n  params: [a.weight]\n").phases(None)[0]
    assert named.parameters(groups) == {"a.weight"}
    expression = written(tmp_path, "0:\n  params: [a.weigh]\n").phases(None)[0]
    assert expression.parameters(groups) == {"a.weight", "a.weight_g"}


def test_phases_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    text = "1:\n  params: [block0.*]\n0:\n  params: [head.*]\n"
    assert Run(written(tmp_path, text)).trains == {"head"}


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "nothing"),
        ("# only a comment\n", 1, "nothing"),
        ("{}", 1, "nothing"),
        ("- head\n- all\n", 1, "a list"),
        ("just words", 1, "the word"),
        ("phase:\n- train: head\n", 1, "the keys phase"),
        ("phases: head\n", 1, "the word 'head' where 'phases' needs a list"),
        ("phases: []\n", 1, "needs a list"),
        ("phases:\n- head\n", 2, "where a phase belongs"),
        ("phases:\n- train: head\n  lenght: 2ep\n", 3, "did you mean 'length'"),
        ("phases:\n- train: head\n  length: 2\n", 3, "'2' for 'length'"),
        ("phases:\n- train: head\n  length:\n", 3, "nothing for 'length'"),
        ("phases:\n- train: head\n  length: [1ep]\n", 3, "a list for 'length'"),
        ("phases:\n- train: head\n  length: 0ep\n", 2, "a length of 0ep"),
        ("phases:\n- train: head\n  patience: 1.5\n", 3, "'1.5' for 'patience'"),
        ("phases:\n- train: head\n  patience: 99999999999\n", 3, "for 'patience'"),
        ("phases:\n- train: head\n  patience: 0\n", 2, "patience below 1"),
        ("phases:\n- train: head\n  lr: -1\n", 2, "above 0"),
        ("phases:\n- train: head\n  lr: nan\n", 2, "above 0"),
        ("phases:\n- train: head\n  mode: best\n", 3, "'best' for 'mode'"),
        ("phases:\n- train: head\n  metric: val_f1\n", 3, "without a 'mode'"),
        ("phases:\n- train: head\n  restore_best: yes\n", 3, "'yes' for 'restore_best'"),
        ("phases:\n- length: 2ep\n", 2, "neither or both"),
        ("phases:\n- train: head\n  add: all\n", 2, "neither or both"),
        ("phases:\n- train: []\n", 2, "needs a list"),
        ("phases:\n- train: [head, {a: b}]\n", 2, "a mapping for 'train'"),
        ("phases:\n- train: ['re:a', head]\n", 2, "before other selectors"),
        ("phases:\n- train: 're:('\n", 2, "bad regular expression"),
        ("phases:\n- train: '10'\n", 2, "no word that says"),
        ("phases:\n- train: head\n  length: 1ep\n- train: head\n- train: all\n", 4, "never ends"),
        ("phases:\n- train: head\n  train: all\n", 3, "the key 'train' twice, first on line 2"),
        ("phases:\n- train: head\nphases:\n- train: all\n", 3, "the key 'phases' twice"),
        ("phases:\n\t- train: head\n", 2, "cannot start any token"),
        ("phases:\n- train: &x head\n- train: *x\n", 3, "the alias"),
        ("phases: !!python/object:os.system []\n", 1, "the tag"),
        ("phases:\n- train: head\n---\nphases: []\n", 1, "more than one document"),
        ("phases: " + "[" * 100, 1, "levels"),
        ("phases:\n- {[a]: b}\n", 2, "a key that is no word"),
        ("phases:\n- train: 'head\n", 3, "quoted scalar that begins on line 2"),
        ("0:\n  params: [head.*]\n0:\n  params: [block0.*]\n", 3, "the key '0' twice"),
        ("0:\n  params: [head.*]\n2:\n  params: [block0.*]\n", 1, "phases 0, 2"),
        ("1:\n  params: [head.*]\n", 1, "phases 1"),
        ("9999999999999:\n  params: [head.*]\n", 1, "phases 9999999999999"),
        ("0: [head]\n", 1, "where phase 0 belongs"),
        ("0:\n  max_transition_epoch: 3\n", 1, "without 'params'"),
        ("0:\n  params: []\n", 2, "needs a list"),
        ("0:\n  params: head.weight\n", 2, "needs a list"),
        ("0:\n  params: ['(']\n", 2, "bad regular expression"),
        ("0:\n  params: [head.*]\n  max_transition_epoch: -2\n", 3, "of -2"),
        ("0:\n  params: [head.*]\n  max_transition_epoch: soon\n", 3, "'soon'"),
        ("0:\n  params: [head.*]\n  lr: 1e-5\n", 3, "phase 0"),
        ("0:\n  params: [head.*]\n1:\n  params: [b]\n  lr: 1e-5\n", 5, "rates are factors"),
        ("0:\n  params: [head.*]\n  new_lr_scheduler: {}\n", 3, "no meaning here"),
        ("0:\n  params: [head.*]\n  new_optimizer: {}\n", 3, "no meaning here"),
        ("0:\n  params: [head.*]\n  param: 1\n", 3, "did you mean 'params'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int, found: str
) -> None:
    with pytest.raises(PolicyError, match=rf"plan\.yaml, line {line}\b") as caught:
        written(tmp_path, text)
    assert found in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"phases: \xff\xfe", "utf-8"),
        (b"phases:\n- train: \x00head\n", "unacceptable character"),
        (b"#" * (MAX_BYTES + 1), "more than 500,000 bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, raw: bytes, found: str) -> None:
    with pytest.raises(PolicyError, match=r"plan\.yaml") as caught:
        written(tmp_path, raw)
    assert found in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="directory"):
        Phases(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("phases:\n- train: head\n  length: 1ep\n- train: hed\n", 4, "nearest names: head"),
        ("phases:\n- train: all\n  length: 1ep\n- add: head\n", 4, "nothing that does not train"),
        ("0:\n  params:\n  - head.weight\n  - haed.bias\n", 4, "nearest names: head.bias"),
        ("0:\n  params: [model.head.weight]\n", 2, "strip=model."),
        ("0:\n  params: [head.*]\n1:\n  params: [nothing.*]\n", 4, "matches no parameter"),
    ],
)
def test_what_matches_nothing_is_refused_before_training(
    tmp_path: Path, text: str, line: int, found: str
) -> None:
    with pytest.raises(PolicyError, match=rf"plan\.yaml, line {line}\b") as caught:
        written(tmp_path, text).init(GROUPS)
    assert found in str(caught.value)


def test_a_long_schedule_stays_small_and_quick(tmp_path: Path) -> None:
    """One phase per group of a deep model: each phase is written down once."""
    groups = example_groups(100)
    text = "".join(f"{i}:\n  params: [{n}\\..*]\n" for i, n in enumerate(reversed(groups.names)))
    policy = written(tmp_path, text)
    assert len(repr(policy)) < 100 * 400
    policy.init(groups)


def test_chain_thaw_has_no_phase_for_a_group_that_never_runs() -> None:
    """Such a phase would train nothing, for which there is not even a gradient to compute."""
    groups = LayerGroups(
        tuple(replace(g, calls=0) if g.name == "block1" else g for g in example_groups(4))
    )
    assert [str(phase.train) for phase in ChainThaw().phases(groups)] == [
        "head", "block0", "block2", "all"
    ]  # fmt: skip


def test_a_change_of_phase_works_out_no_more_than_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All phases at each change would be quadratic work over a run of one phase per group."""
    groups, asked = example_groups(30), list[Phase]()
    policy = ChainThaw(length=D("1st"))
    state = policy.init(groups)
    once = Phase.parameters
    monkeypatch.setattr(Phase, "parameters", lambda s, g: (asked.append(s), once(s, g))[1])
    for step in range(31):
        kind = EventKind.STEP if step else EventKind.START
        plan, state = policy.decide(groups, state, Event(kind, Progress(step, 40, 10)))
        assert plan.phase == step
    assert len(asked) == 31
