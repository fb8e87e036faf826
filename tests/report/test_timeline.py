"""The timeline says of every group at every update what the plan in force says."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from frostline.plan import FreezePlan
from frostline.policy import Decision
from frostline.records import RunRecord
from frostline.report.timeline import Phase, Timeline, coarser, timeline

GROUPS = {"stem": 10, "body": 70, "head": 20}
PLANS = st.builds(
    FreezePlan,
    frozen=st.frozensets(st.sampled_from(["stem", "body"])),
    lr_scale=st.dictionaries(st.sampled_from([*GROUPS]), st.sampled_from([0.0, 0.5, 1.0])),
    exempt=st.dictionaries(st.just("stem"), st.just(frozenset({"stem.bias"}))),
    live_norm=st.frozensets(st.just("body")),
)
STEPS = st.lists(st.integers(0, 40), max_size=8).map(lambda steps: sorted([0, *steps]))


@st.composite
def records(draw: st.DrawFn) -> RunRecord:
    decisions = tuple(Decision(step, draw(PLANS)) for step in draw(STEPS))
    return record(decisions, steps=draw(st.integers(1, 50)))


def record(decisions: tuple[Decision, ...], *, steps: int, epochs: tuple = ()) -> RunRecord:
    header = {"groups": GROUPS, "head": ["head"]}
    return RunRecord(Path("run"), header, epochs, decisions, None, {"steps": steps}, torn=False)


def covers(found: Timeline) -> None:
    for group in found.groups:
        own = [span for span in found.spans if span.group == group]
        ends = [0, *(span.to_step for span in own)]
        assert [span.from_step for span in own] == ends[:-1]
        assert ends[-1] == found.end_step
        assert all(span.to_step > span.from_step for span in own)


@given(records())
def test_every_group_at_every_update_does_what_the_plan_in_force_says(run: RunRecord):
    found = timeline(run)
    covers(found)
    assert found.end_step >= max(d.step for d in run.decisions)
    for step in range(found.end_step):
        plan = [d.plan for d in run.decisions if d.step <= step][-1]
        now = {s.group: s.phase for s in found.spans if s.from_step <= step < s.to_step}
        assert now == {group: Phase.of(group, plan) for group in GROUPS}


@given(records())
def test_neighbouring_spans_differ_and_name_the_decision_that_began_them(run: RunRecord):
    found = timeline(run)
    for before, after in zip(found.spans, found.spans[1:], strict=False):
        if before.group == after.group:
            assert before.phase != after.phase
            assert found.changes[after.change].step == after.from_step


@given(records(), st.integers(1, 12))
def test_a_coarser_timeline_has_no_more_spans_than_asked_and_still_covers_all(run, most):
    found = coarser(timeline(run), most)
    covers(found)
    assert len(found.spans) <= max(most, len(GROUPS))
    assert len(found.changes) == len(run.decisions)
    if len(timeline(run).spans) <= most:
        assert found == timeline(run)


def test_a_decision_says_what_changed_and_what_was_seen():
    epochs = (
        {"epoch": 1, "step": 10, "metrics": {}, "costs": {"training_s": 4.0}},
        {"epoch": 2, "step": 20, "metrics": {}, "costs": {"training_s": 12.0}},
    )
    seen = {"gradient": {"stem": 3.0, "body": 1.0, "head": 2.0}}
    decisions = (
        Decision(0, FreezePlan(frozen=frozenset({"stem", "body"}), reason="head first")),
        Decision(15, FreezePlan(frozen=frozenset({"stem"}), reason="it fell"), signals=seen,
                 metrics={"val_loss": 0.5}),
    )  # fmt: skip
    found = timeline(record(decisions, steps=20, epochs=epochs))
    first, second = found.changes
    assert (first.frozen, first.unfrozen, first.trained_share) == (("stem", "body"), (), 0.2)
    assert (second.frozen, second.unfrozen) == ((), ("body",))
    assert (second.epoch, second.seconds) == (1.5, 8.0)
    assert second.signals == {"gradient": (1.0, 2.0, 3.0)}
    assert second.metrics == {"val_loss": 0.5}
    body = [span for span in found.spans if span.group == "body"]
    assert body[1].signals == {"gradient": 1.0}
    assert found.frozen_share("body") == 0.75
    assert found.sentence() == (
        "3 layer groups over 20 updates, 2 decisions; "
        "frozen throughout: 1, part of the time: 1, never: 1"
    )


def test_a_run_without_decisions_trains_everything():
    found = timeline(record((), steps=5))
    covers(found)
    assert {span.phase.kind for span in found.spans} == {"training"}
