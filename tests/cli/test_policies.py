"""`frostline policies` shows what is registered, as it is written on the command line."""

from __future__ import annotations

import dataclasses
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from frostline.cli import cards, policies
from frostline.compose import Live, Then
from frostline.errors import PolicyError
from frostline.groups import LayerGroups
from frostline.plan import FreezePlan
from frostline.policies.scheduled import Gradual
from frostline.policies.static import Freeze, LinearProbe
from frostline.policy import Event, Policy, State
from frostline.registry import (
    FAMILIES,
    available_combinators,
    available_policies,
    default_policy,
    make_policy,
    policy_class,
    policy_family,
)
from frostline.shortform import options_of
from frostline.tasks.run import _settings

EVERY = (*available_policies(), *available_combinators())


def test_each_policy_has_a_line_under_its_family(cli):
    done = cli("policies")
    assert done.code == 0
    under = {}
    family = None
    for line in done.out.splitlines():
        if line.partition(":")[0] in FAMILIES and not line.startswith(" "):
            family = line.partition(":")[0]
        elif line.split()[:1] and line.split()[0] in EVERY:
            under[line.split()[0]] = family
    assert under == {name: policy_family(name) for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_the_line_of_a_policy_is_one_short_sentence(name):
    summary = cards.card(name).summary
    assert 10 < len(summary) <= 90
    assert summary.endswith(".")


@pytest.mark.parametrize("name", EVERY)
def test_one_policy_shows_its_meaning_and_options(cli, name):
    done = cli("policies", name)
    assert done.code == 0
    assert f"--policy {name}" in done.out.replace("'", "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    # Nothing is on the screen twice.
    long = [line for line in lines if len(line) > 40]
    assert len(long) == len(set(long))
    assert "Attributes:" not in done.out
    assert ">>>" not in done.out


@pytest.mark.parametrize("name", EVERY)
def test_every_option_says_what_it_means(name):
    shown = cards.card(name)
    assert [o.option for o in shown.options] == [f.name for f in options_of(policy_class(name))]
    silent = [o.option for o in shown.options if len(o.meaning) < 5]
    assert not silent


@pytest.mark.parametrize("name", [n for n in EVERY if default_policy(n) is not None])
def test_the_printed_short_form_builds_the_default_policy(cli, name):
    shown = next(line for line in cli("policies", name).out.splitlines() if "--policy" in line)
    _, spec = shlex.split(shown)
    assert make_policy(spec) == make_policy(name)


@pytest.mark.parametrize("name", available_policies())
def test_price_and_signals_are_shown(cli, name):
    out = " ".join(cli("policies", name).out.split())
    if (policy := default_policy(name)) is None:
        return
    assert " ".join(policy.notice().split()) in out
    assert all(need.signal in out for need in policy.needs())


def test_required_options_are_named(cli):
    option = json.loads(cli("policies", "freeze", "--json").out)["options"][0]
    meaning = option.pop("meaning")
    assert option == {"option": "select", "type": "str", "default": "required"}
    assert "selector" in meaning


def test_json_lists_every_policy(cli):
    listed = json.loads(cli("policies", "--json").out)
    assert list(listed) == list(EVERY)
    assert listed["gradual"]["family"] == "scheduled"
    assert listed["placebo"]["family"] == "combinator"


# -- evidence -----------------------------------------------------------------------------------

ENTRY = {
    "spec": "gradual:until=50%",
    "accuracy": [0.8, 0.82],
    "full": [0.81, 0.83],
    "compute_share": 0.614,
    "vs_full": [-0.01, -0.02, 0.01],
    "vs_prefix": [0.02, None, None],
    "vs_time_matched": [0.0, -0.01, 0.01],
    "vs_placebo": None,
    "verdict": "Within seed noise.\x1b[31m",
    "overhead": {"resnet20": 0.3, "bert": 0.12},
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    found = {
        "setting": "ResNet-20 on pictures",
        "policies": {"gradual": ENTRY, "full": {"overhead": {"bert": 0.0}}},
    }
    (tmp_path / "evidence.json").write_text(json.dumps(found))
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    cards._measured.cache_clear()
    yield
    cards._measured.cache_clear()


@pytest.mark.usefixtures("measured")
def test_measured_evidence_is_shown(cli):
    lines = [line.strip() for line in cli("policies", "gradual").out.splitlines()]
    start = lines.index("Evidence:")
    assert lines[start + 1 :][:8] == [
        "ResNet-20 on pictures, as gradual:until=50%:",
        "test accuracy 81.0 %, full fine-tuning 82.0 %",
        "61% of the compute of full fine-tuning",
        "-1.0 (-2.0 to +1.0) points against full fine-tuning",
        "+2.0 points against a static prefix of equal compute",
        "+0.0 (-1.0 to +1.0) points against full fine-tuning cut to its compute",
        "Within seed noise.\\x1b[31m",
        "its own cost, of a training step: 0.3 % on ResNet-20, 0.1 % on BERT 6x384",
    ]
    shown = json.loads(cli("policies", "gradual", "--json").out)["evidence"]
    assert shown == {"setting": "ResNet-20 on pictures", **ENTRY}


@pytest.mark.usefixtures("measured")
def test_what_was_not_measured_says_so(cli):
    assert "not measured" in cli("policies", "freeze").out
    assert json.loads(cli("policies", "freeze", "--json").out)["evidence"] is None
    only_price = cli("policies", "full").out
    assert "not measured" in only_price
    assert "0.0 % on BERT" in only_price
    assert "Evidence" not in cli("policies", "placebo").out


def test_the_evidence_that_is_shipped_can_be_shown(cli):
    cards._measured.cache_clear()
    for name, entry in cards._measured().items():
        assert name in EVERY
        out = " ".join(cli("policies", name).out.split())  # wrapped at the terminal's width
        assert entry.get("verdict", "") in out


# -- docstrings ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Documented(Policy):
    """What it does.

    More: about it.

    Attributes:
        first: of two
            lines.
        second: one.

    Behind the options.

    References:
        Somebody 2000.

    Example:
        >>> 1
        1
    """

    first: int = 1
    second: str = "a, b"

    def decide(self, groups: LayerGroups, state: State, event: Event) -> tuple[FreezePlan, State]:
        return FreezePlan(), state


def test_a_docstring_is_read_by_section(monkeypatch):
    for name in ("policy_class", "policy_family", "default_policy"):
        monkeypatch.setattr(cards, name, lambda _: _Documented)
    monkeypatch.setattr(cards, "default_policy", lambda _: None)
    monkeypatch.setattr(cards, "policy_family", lambda _: "static")
    shown = cards.card("documented")
    assert shown.summary == "What it does."
    assert [line for line in shown.description.splitlines() if line] == [
        "What it does.", "More: about it.", "Behind the options.",
    ]  # fmt: skip
    assert [dataclasses.astuple(o) for o in shown.options] == [
        ("first", "int", "1", "of two lines."),
        ("second", "str", "'a, b'", "one."),
    ]
    assert shown.references == "Somebody 2000."


def test_what_a_policy_says_of_itself_cannot_steer_the_terminal(cli, monkeypatch):
    hostile = dataclasses.replace(
        cards.card("gradual"), description="a\x1b[2Jb", notice="c\u202ed", references="e\x07f"
    )
    monkeypatch.setattr(policies, "card", lambda _: hostile)
    out = cli("policies", "gradual").out
    assert not {"\x1b", "\u202e", "\x07"} & set(out)


# -- as they are used ---------------------------------------------------------------------------

NESTED = "then:first=(linear-probe),after=1ep,second=(placebo:policy=(gradual:until=50%),seed=1)"


@pytest.mark.parametrize(
    "spec",
    [
        "gradul",
        "placebo:policy=(gradul)",
        "placebo:policy=(gradual",
        "then:first=(full)",
        "live:policy=(" * 200,
        "freeze:select=" + "(" * 5000,
        "gradual:groups_per_step=1e9",
        "gradual:groups_per_step=" + "9" * 100,
        "gradual:every=999999999999999999999999%",
        "max-frozen:policy=(full),fraction=inf",
        "placebo:\x1b[31m",
        "phases:file=/no/such/file",
        "phases:file=/",
        "phases:file=\x00",
    ],
    ids=lambda spec: ascii(spec[:40]),
)
def test_a_bad_policy_is_one_message(cli, spec, tmp_path):
    done = cli("fit", "timm:test_resnet", tmp_path, "--policy", spec, "--weights", "random",
               "--output", tmp_path / "run")  # fmt: skip
    assert done.code in (1, 2)
    assert done.lines[0].startswith("cannot ")
    assert "Traceback" not in done.err
    assert "unexpected" not in done.lines[0]
    assert "\x1b" not in done.err


def test_a_nested_policy_trains_and_is_recorded(cli, tmp_path):
    random = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(100 * number, 100 * number + 99, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    done = cli(
        "fit", "timm:test_resnet", tmp_path / "photos", "--policy", NESTED, "--epochs", "2",
        "--weights", "random", "--image-size", "32", "--batch-size", "4", "--quiet",
        "--output", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    config = (tmp_path / "run/config.yaml").read_text()
    again = cli("fit", "--config", tmp_path / "run/config.yaml", "--print-config").out
    assert NESTED in config
    assert NESTED in again


def test_combined_policies_given_as_objects_are_recorded_by_their_short_form():
    combined = Then(LinearProbe(), Gradual().every, Live(Freeze("kind:norm | (head)")))
    config = _settings(None, {"model": "m", "data": "d", "policy": combined})
    assert config.policy == (
        "then:first=(linear-probe),after=1ep,"
        "second=(live:policy=(freeze:select=kind:norm | (head)))"
    )
    assert make_policy(config.policy) == combined


def test_a_policy_that_has_no_short_form_is_refused_when_it_is_given():
    with pytest.raises(PolicyError, match="no short form"):
        _settings(None, {"model": "m", "data": "d", "policy": Live(_Documented())})
