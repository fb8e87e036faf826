"""`frostline inspect` shows what the groups and their measured costs say."""

from __future__ import annotations

import itertools
import json

import pytest

from frostline.errors import ModelError

TINY = ("timm:test_resnet", "--batch-size", "2", "--image-size", "32")


@pytest.fixture(scope="module")
def rows() -> dict:
    """The JSON of a tiny model, measured once."""
    import contextlib
    import io

    from frostline.cli.app import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["inspect", *TINY, "--classes", "3", "--json"]) == 0
    return json.loads(out.getvalue())


def test_groups_are_in_execution_order_and_complete(rows):
    import timm

    groups = rows["groups"]
    assert [g["depth"] for g in groups] == list(range(len(groups)))
    assert [g["head"] for g in groups] == [False] * (len(groups) - 1) + [True]
    whole = timm.create_model("test_resnet", num_classes=3)
    assert sum(g["parameters"] for g in groups) == sum(p.numel() for p in whole.parameters())


def test_shares_and_savings_are_shares(rows):
    groups = rows["groups"]
    assert sum(g["forward_share"] for g in groups) == pytest.approx(1)
    assert sum(g["backward_share"] for g in groups) == pytest.approx(1)
    savings = [g["saving"] for g in groups]
    # Measured times: what freezing the first group saves of so small a step is within the noise.
    assert all(later >= earlier - 0.05 for earlier, later in itertools.pairwise(savings))
    assert all(-0.05 <= g["saving"] <= g["cached_saving"] <= 1 for g in groups)
    assert all(g["activation_bytes"] > 0 for g in groups[:-1])


def test_the_table_names_every_group_and_explains_its_columns(cli, rows):
    done = cli("inspect", *TINY)
    assert done.code == 0
    for group in rows["groups"]:
        assert f" {group['name']} " in done.out
    assert f"{rows['groups'][-1]['name']} (head)" in done.out
    assert "freezing up to here" in done.out


def test_freezing_everything_is_not_offered_as_a_saving(cli):
    last = next(line for line in cli("inspect", *TINY).out.splitlines() if "(head)" in line)
    assert last.split()[-2:] == ["-", "-"]


def test_an_unknown_model_gets_one_message(cli):
    done = cli("inspect", "timm:resnet1")
    assert done.code == ModelError.exit_code
    assert done.lines[0] == "cannot build timm:resnet1"
    assert "did you mean" in done.lines[1]
    assert len(done.lines) == 3


@pytest.mark.parametrize("arguments", [["resnet18"], ["timm:test_resnet", "--batch-size", "0"]])
def test_bad_arguments_get_one_message(cli, arguments):
    done = cli("inspect", *arguments)
    assert done.code in (1, 2)
    assert done.lines[0].startswith("cannot ")
    assert len(done.lines) == 3
    assert done.out == ""
