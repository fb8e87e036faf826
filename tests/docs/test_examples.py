"""The code in the documentation runs, and the commands in it parse."""

from __future__ import annotations

import inspect
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frostline.cli.app import app
from frostline.cli.flags import overrides
from frostline.records import read_run
from frostline.registry import make_policy
from frostline.tasks.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall(page.read_text("utf-8")) if kind == language]


def _commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in _blocks(page, "shell"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("frostline "):
                    yield page.name, line


def test_the_pages_hold_examples():
    assert len(list(_commands())) >= 10


@pytest.mark.parametrize(("page", "line"), list(_commands()))
def test_every_command_parses(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a schedule lies that some of them name
    (tmp_path / "schedule.yaml").write_text("phases:\n- train: all\n")
    tokens = shlex.split(line.partition("  #")[0])[1:]
    if "--help" in tokens or "--version" in tokens:
        return
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if command.__name__ != "fit":
        return
    given = {k: v for k, v in bound.arguments.items() if k in _settings(command)}
    if "config" in bound.arguments:
        return  # the file of the example is not here
    config = load_config(None, overrides({k: v for k, v in given.items() if v is not None}))
    make_policy(config.policy)


def _settings(command: object) -> set[str]:
    from frostline.tasks.config import RunConfig

    return set(inspect.signature(command).parameters) & set(RunConfig.model_fields)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_guide_runs_from_top_to_bottom():
    names: dict = {}
    for code in _blocks(ROOT / "docs/guide.md", "python"):
        exec(code, names)  # noqa: S102  our own page
    assert len(names["certificate"].holds) > 0
    assert names["found"] == {"epoch": 3}


@pytest.mark.parametrize("name", ["cache", "cache_foretell", "cache_loops", "cache_views"])
def test_the_pages_of_the_cache_run_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "stores"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict = {}
    blocks = _blocks(ROOT / f"docs/{name}.md", "python")
    assert blocks
    for code in blocks:
        exec(code, names)  # noqa: S102  our own page
    if "cache" in names:
        assert names["cache"].report.replayed == names["cache"].report.batches > 0


def test_what_the_page_of_the_cache_prints_is_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict = {}
    for code in _blocks(ROOT / "docs/cache.md", "python"):
        said = re.findall(r"^# (.*)$", code, re.MULTILINE)
        capsys.readouterr()
        exec(code, names)  # noqa: S102  our own page
        assert capsys.readouterr().out.splitlines() == said


def test_the_page_of_following_a_run_runs(capsys):
    (code,) = _blocks(ROOT / "docs/live.md", "python")
    exec(code, {})  # noqa: S102  our own page
    assert "loss" in capsys.readouterr().out


def test_the_loop_of_the_page_of_reports_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = _blocks(ROOT / "docs/report.md", "python")
    exec(code, {})  # noqa: S102  our own page
    assert read_run("runs/mine").finished
    assert len(read_run("runs/mine").epochs) == 2


#: What the first example of a page names and a test cannot have, and what stands in for it.
_STAND_INS = {
    '"timm:resnet18"': '"timm:test_resnet"',
    "epochs=5": "epochs=1, weights='random', image_size=32",
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with pictures, to be in."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(100 * number, 100 * number + 99, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")


def _run_first(page: str, stand_ins: dict[str, str]) -> dict:
    """What the first example of a page leaves."""
    code = _blocks(ROOT / page, "python")[0]
    for written, stand_in in stand_ins.items():
        assert written in code
        code = code.replace(written, stand_in)
    names: dict = {}
    exec(code, names)  # noqa: S102  our own page
    return names


def test_the_five_lines_of_the_readme_run(photos):
    names = _run_first("README.md", _STAND_INS)
    assert names["run"].path == Path("runs/test_resnet-gradual-001")


def test_the_example_of_a_diagnosis_runs(photos):
    short = {"epochs=2": "epochs=1, weights='random', image_size=32"}
    found = _run_first("docs/diagnosis.md", _STAND_INS | short)["found"]
    assert found.runs == ("runs/test_resnet-linear-probe-001",)
    pieces = [e for f in (*found.findings, *found.considered) for e in f.evidence]
    assert "reference" in {e.source for e in pieces}


def test_the_example_of_a_learning_curve_runs(photos):
    names = _run_first("docs/learning_curve.md", _STAND_INS | {"seeds=3": "seeds=1, isolate=False"})
    assert [point.size for point in names["curve"]["full"]] == [6, 12]
    assert Path("studies/photos-test_resnet-curve").is_dir()


def test_the_pieces_of_the_readme_run():
    names: dict = {}
    exec(_blocks(ROOT / "README.md", "python")[1], names)  # noqa: S102  our own page
    assert len(names["certificate"].holds) > 0
