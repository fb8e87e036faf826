"""Defects of public implementations of freezing rules, and the tests that hold ours free of them.

Each row says what goes wrong elsewhere and names the tests that would fail if it went wrong here.
What no other test covers is tested below.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from frostline.backends.torch.freeze import torch_driver
from frostline.clock import Duration
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policy import Event, Policy, State
from frostline.signals import SIGNALS, Need

TESTS = Path(__file__).resolve().parents[1]
HERE = "policies/test_known_defects.py"

#: Where, what goes wrong there, and the tests (file under tests/ :: function) that cover it.
DEFECTS: list[tuple[str, str, tuple[str, ...]]] = [
    (
        "PipeTransformer",
        "the gradient rule is never reached, and what it would read is not added up",
        (
            "policies/test_gradients.py::test_pipetransformer_gradient_rule_is_reachable_and_adds_up",
        ),
    ),
    (
        "GradES",
        "changes of weights stand for gradients, so a decaying learning rate freezes everything",
        (
            "policies/test_gradients.py::test_grades_does_not_take_a_decaying_rate_for_convergence",
            "policies/test_gradients.py::test_grades_freezes_when_gradients_shrink_whatever_the_rate",
        ),
    ),
    (
        "GradES",
        "the threshold is absolute: it depends on the size of a matrix",
        ("policies/test_gradients.py::test_grades_is_free_of_scale_when_relative",),
    ),
    (
        "Egeria as a baseline in budgeted-cl",
        "the slope is fitted over abscissas that are all 0",
        ("policies/test_activations.py::test_egeria_agrees_with_numpy",),
    ),
    (
        "Egeria as a baseline in budgeted-cl",
        "`grad = False` is set in place of `requires_grad`, so nothing is frozen or saved",
        (
            "backends/torch/test_backend.py::test_the_frozen_prefix_records_no_graph",
            "backends/torch/test_pitfalls.py::test_moco_14_zeroed_gradients_leave_momentum_and_decay_nothing_to_do",
        ),
    ),
    (
        "Egeria as a baseline in budgeted-cl",
        "the reference is renewed at every reading but those at which it should be",
        (
            "core/test_gauges.py::test_a_snapshot_is_refreshed_after_a_reading",
            "policies/test_activations.py::test_refresh_happens_when_the_policy_believes",
        ),
    ),
    (
        "Egeria as a baseline in budgeted-cl",
        "frozen groups are charged a whole backward pass",
        ("core/test_cost.py::test_hand_worked_step",),
    ),
    (
        "Egeria, algorithm 1",
        "the slope is compared with its sign, so falling plasticity counts as settled",
        (
            "policies/test_activations.py::test_egeria_does_not_take_falling_plasticity_for_a_settled_one",
        ),
    ),
    (
        "APF in an earlier TimelyFreeze",
        "changes are averaged over a tensor before their magnitude is taken, so they cancel",
        (
            "policies/test_perturbation.py::test_apf_does_not_take_opposite_moves_of_two_weights_for_rest",
            "core/test_signals.py::test_perturbation_of_weights_moving_in_opposite_directions_does_not_cancel",
        ),
    ),
    (
        "APF in plato",
        "the comparison is the wrong way round: what moves is frozen",
        (
            "policies/test_perturbation.py::test_apf_freezes_weights_that_jitter_and_wakes_them_when_they_travel",
            "policies/test_perturbation.py::test_apf_lets_a_group_that_always_moves_train",
        ),
    ),
    (
        "AutoFreeze in an earlier TimelyFreeze",
        "gradients of single steps stand for those summed over an interval",
        ("policies/test_gradients.py::test_autofreeze_compares_sums_so_that_noise_cancels",),
    ),
    (
        "AutoFreeze in an earlier TimelyFreeze",
        "layers are ordered by digits in the names of their parameters",
        (
            "backends/torch/test_grouping.py::test_order_is_execution_not_definition",
            f"{HERE}::test_digits_in_names_do_not_order_groups",
        ),
    ),
    (
        "AutoFreeze",
        "a new optimizer at each decision: the loss of momentum is part of what is reported",
        (
            "backends/torch/test_pitfalls.py::test_autofreeze_unfreezing_keeps_momentum_and_the_rate_on_schedule",
        ),
    ),
    (
        "ElasticTrainer, GreenTrainer",
        "measuring importance moves weights and optimizer state, and they are not put back",
        (
            f"{HERE}::test_reading_a_signal_changes_nothing_in_training",
            "policies/test_budget.py::test_sampling_importance_leaves_weights_and_optimizer_alone",
        ),
    ),
    (
        "ElasticTrainer",
        "the best epoch is chosen on the test data",
        (
            "tasks/test_resume.py::test_the_test_split_is_seen_once_and_training_is_over_then",
            "tasks/test_loop.py::test_the_best_epoch_is_by_accuracy_then_loss",
        ),
    ),
    (
        "surgical fine-tuning",
        "`requires_grad` is left on for what is tuned with a rate of 0: no time is saved",
        (
            "backends/torch/test_backend.py::test_the_frozen_prefix_records_no_graph",
            "policies/test_importance.py::test_selection_really_freezes",
        ),
    ),
    (
        "surgical fine-tuning",
        "the ratio is compared with a fixed threshold though it is not brought to 0 to 1",
        ("policies/test_importance.py::test_auto_snr_brings_ratios_to_one_before_the_threshold",),
    ),
    (
        "surgical fine-tuning",
        "the variance of the signal-to-noise ratio is over an axis of the weight, not over batches",
        ("core/test_signals.py::test_snr_is_squared_mean_over_variance_per_weight",),
    ),
    (
        "SlimFit",
        "relative changes are divided by weights of 0",
        ("core/test_signals.py::test_a_weight_of_zero_changes_by_its_size",),
    ),
    (
        "LISA callbacks",
        "freezing before the optimizer is built leaves layers out of it: they never train",
        (
            "backends/torch/test_pitfalls.py::test_lmflow_726_an_optimizer_of_the_head_alone_is_refused",
        ),
    ),
    (
        "LISA callbacks",
        "optimizer state of layers that were active once is never freed",
        (
            "backends/torch/test_pitfalls.py::test_composer_lisa_released_state_gives_its_memory_back",
            "policies/test_rotating.py::test_lisa_keeps_or_releases_the_optimizers_memory",
        ),
    ),
    (
        "Composer",
        "layers freeze in the order in which they are defined, not in which they run",
        (
            "policies/test_progressive.py::test_the_order_is_that_of_execution",
            "policies/test_progressive.py::test_the_prefix_of_a_real_network_is_what_runs_first",
        ),
    ),
    (
        "Composer",
        "a run with frozen layers can be neither saved nor resumed",
        (
            "backends/torch/test_checkpoint.py::test_a_resumed_loop_equals_the_uninterrupted_one",
            "core/test_driver.py::test_interrupted_equals_uninterrupted",
        ),
    ),
    (
        "Lightning callbacks",
        "resume freezes again what had been unfrozen",
        (
            "backends/torch/test_pitfalls.py::test_lightning_21901_resume_does_not_refreeze_what_was_unfrozen",
        ),
    ),
]


@functools.cache
def _tests_of(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize(
    "node", sorted({node for _, _, nodes in DEFECTS for node in nodes}), ids=lambda n: n
)
def test_what_covers_a_defect_is_a_test(node: str) -> None:
    file, _, name = node.partition("::")
    assert name in _tests_of(file)


def test_every_defect_is_covered_and_listed_once() -> None:
    assert all(nodes for _, _, nodes in DEFECTS)
    said = [(where, what) for where, what, _ in DEFECTS]
    assert len(set(said)) == len(said)


# -- what no other test covers ------------------------------------------------------------------


class _Net(nn.Module):
    """Runs `layer10` before `layer2`; with a norm and dropout, so that modes and draws count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer2 = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh())
        self.layer10 = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer10(x)))


@dataclass(frozen=True, slots=True)
class Reads(Policy):
    """Freezes one group throughout, and reads a signal for nothing."""

    signal: str | None

    def needs(self) -> tuple[Need, ...]:
        if self.signal is None:
            return ()
        every = None if SIGNALS[self.signal].static else Duration.parse("3st")
        return (Need(self.signal, every, steps=2, frozen_too=every is not None),)

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(frozen=frozenset(groups.names[:1])), state


def _trained(signal: str | None) -> list[torch.Tensor]:
    """Everything that training leaves: weights, statistics, optimizer state, random draws."""
    torch.manual_seed(0)
    model = _Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    driver = torch_driver(model, optimizer, Reads(signal), total_steps=8, steps_per_epoch=4)
    data = torch.Generator().manual_seed(1)
    for _ in range(8):
        with driver.step():
            x = torch.randn(16, 4, generator=data)
            loss = nn.functional.cross_entropy(model(x), torch.arange(16) % 3)
            loss.backward()
            driver.sample(loss=float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    read = signal is None or signal in driver.costs.signal_s
    driver.finish()
    assert read, "the signal was never read"
    kept = [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
    return [*(t.clone() for t in model.state_dict().values()), *kept, torch.rand(3)]


@pytest.mark.parametrize("signal", sorted(SIGNALS))
def test_reading_a_signal_changes_nothing_in_training(signal: str) -> None:
    """ElasticTrainer and GreenTrainer take two real optimizer steps and put only weights back."""
    without, reading = _trained(None), _trained(signal)
    assert len(without) == len(reading)
    assert all(torch.equal(a, b) for a, b in zip(without, reading, strict=True))


def test_digits_in_names_do_not_order_groups() -> None:
    model = _Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver = torch_driver(model, optimizer, "first:groups=1", total_steps=1)
    with driver.step() as plan:
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
    assert plan.frozen == {"layer10"}
