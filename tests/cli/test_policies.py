"""`frostline policies` shows what is registered, as it is written on the command line."""

from __future__ import annotations

import json

import pytest

from frostline.registry import available_policies, make_policy


def test_each_policy_has_a_line(cli):
    done = cli("policies")
    assert done.code == 0
    for name in available_policies():
        assert any(line.split()[:1] == [name] for line in done.out.splitlines())


@pytest.mark.parametrize("name", sorted(available_policies()))
def test_one_policy_shows_its_meaning_and_options(cli, name):
    done = cli("policies", name)
    assert done.code == 0
    assert f"--policy {name}" in done.out


@pytest.mark.parametrize("name", ["full", "linear-probe", "gradual"])
def test_the_printed_short_form_builds_the_default_policy(cli, name):
    shown = next(line for line in cli("policies", name).out.splitlines() if "--policy" in line)
    assert make_policy(shown.removeprefix("--policy ")) == make_policy(name)


def test_required_options_are_named(cli):
    option = json.loads(cli("policies", "freeze", "--json").out)["options"][0]
    assert option == {"option": "select", "type": "str", "default": "required"}


def test_json_lists_every_policy(cli):
    assert json.loads(cli("policies", "--json").out).keys() == available_policies().keys()
