"""`frostline inspect MODEL --data D` foretells a run at every depth, and trains nothing."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest

from frostline.cli.inspect import time_text
from frostline.errors import ConfigError, DataError

TINY = ("tiny_task:tiny_model", "--data", "tiny_task:tiny_data", "--batch-size", "8")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """The JSON of a tiny task, foretold once."""
    from frostline.cli.app import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run(["inspect", *TINY, "--epochs", "4", "--augment", "none", "--json"]) == 0
    return json.loads(out.getvalue())


def test_every_depth_but_a_frozen_head_is_foretold(told: dict[str, Any]) -> None:
    run, groups = told["run"], told["groups"]
    assert [d["depth"] for d in run["depths"]] == list(range(len(groups)))
    for depth in run["depths"]:
        assert depth["frozen"] == [g["name"] for g in groups[: depth["depth"]]]
        assert depth["step_s"] > 0
        assert depth["epoch_s"] > 0
        assert depth["advice"] == "cache" or depth["advice"].startswith("no: ")


def test_the_work_is_that_of_the_data(told: dict[str, Any]) -> None:
    work = told["run"]["work"]
    assert (work["samples"], work["val_samples"], work["epochs"]) == (49, 12, 4)
    assert work["load_s"] > 0
    assert work["save_s"] > 0
    assert told["run"]["batch_size"] == 8


def test_the_store_holds_rows_of_all_samples(told: dict[str, Any]) -> None:
    sizes = [4 * 8 * 8 * 4, 6 * 8 * 8 * 4, 6 * 4]  # (4, 8, 8), (6, 8, 8), then pooled
    for depth, size in zip(told["run"]["depths"][1:], sizes, strict=True):
        assert depth["row_bytes"] == size, depth
        assert depth["disk_bytes"] == size * (49 + 12)


def test_an_epoch_holds_its_steps_and_validations(told: dict[str, Any]) -> None:
    for depth in told["run"]["depths"]:
        assert depth["epoch_s"] > 49 / 8 * depth["step_s"] + 12 / 8 * depth["eval_s"]
        if depth["cached_epoch_s"] is not None:
            assert depth["first_epoch_s"] > depth["cached_epoch_s"]
            assert depth["cached_epoch_s"] > 49 / 8 * depth["cached_step_s"]


def test_the_tables_have_a_line_per_depth_and_a_legend(cli: Any) -> None:
    done = cli("inspect", *TINY, "--views", "3", "--epochs", "2")
    assert done.code == 0
    lines = done.out.splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("tiny_task:tiny_data: 49 "))
    for words in ("step", "cached", "epoch", "first", "cached epoch", "pays after", "memory"):
        assert words in lines[title + 2]
    rows = [line for line in lines[title + 3 :] if " ms " in line][:4]
    assert [row.split()[0].rstrip("*") for row in rows] == ["0", "1", "2", "3"]
    assert "no: nothing is frozen" in rows[0]
    assert "MiB" in rows[0] or "-" in rows[0]
    assert "disk:  " in done.out
    assert "note: preparing samples takes" in done.out
    assert "3 augmented views" in done.out
    assert "measuring steps with 3 of 4 groups frozen" in done.err


def test_nothing_is_written_where_it_is_called(cli: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("inspect", *TINY).code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--views", "0"], ConfigError, "cannot store 0 views"),
        (["--views", "2", "--augment", "none"], ConfigError, "cannot store 2 views"),
        (["--batch-size", "2"], DataError, "cannot foretell what training costs"),
        (["--epochs", "0"], ConfigError, "epochs"),
        (["--precision", "fp16"], ConfigError, "cannot train in fp16 on cpu"),
    ],
)
def test_what_cannot_be_foretold_gets_one_message(
    cli: Any, arguments: list[str], error: type[Exception], words: str
) -> None:
    done = cli("inspect", *TINY[:3], *(TINY[3:] if "--batch-size" not in arguments else ()),
               *arguments)  # fmt: skip
    assert done.code == error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
    message = [line for line in done.lines if not line.startswith("measuring ")]
    assert words in message[0]
    assert len(message) == 3
    assert done.out == ""


def test_missing_data_gets_one_message(cli: Any) -> None:
    done = cli("inspect", TINY[0], "--data", "nowhere")
    assert done.code == DataError.exit_code
    assert "nowhere" in done.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1e-6, "0.00 ms"), (0.00999, "9.99 ms"), (0.0999, "99.9 ms"), (1.0, "1.00 s"), (100, "100 s")],
)
def test_times_have_units(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
