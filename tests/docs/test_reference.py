"""What the documentation says about settings and policies is what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from frostline.cli.cards import card
from frostline.registry import available_combinators, available_policies, policy_class
from frostline.shortform import options_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "policies"


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("name", ["config_reference", "policies_index"])
def test_what_a_script_writes_is_current(name):
    script = _script(name)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), f"run: python docs/{name}.py"


@pytest.mark.parametrize("name", available_policies())
def test_every_policy_has_a_page_with_all_its_parts(name):
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert "\n## Claimed\n" in text
    lines = text.splitlines()
    assert lines.count("<!-- evidence -->") == lines.count("<!-- /evidence -->") == 1
    assert lines.index("<!-- evidence -->") < lines.index("<!-- /evidence -->")
    assert lines.index("## Evidence") < lines.index("<!-- evidence -->")
    assert re.search(r"^(Sources?|References): ", text, re.MULTILINE)
    assert f" {name}" in text.partition("```shell\n")[2].partition("```")[0].replace('"', " ")
    _assert_same_options(text, name)


@pytest.mark.parametrize("name", available_combinators())
def test_every_combinator_has_a_section_with_all_its_options(name):
    text = (PAGES / "combinators.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    _assert_same_options(sections[name], name)


def _assert_same_options(text: str, name: str) -> None:
    table = re.findall(r"^\| `([^`]*)` \| ([^|]*) \|", _table(text), re.MULTILINE)
    assert [option for option, _ in table] == [f.name for f in options_of(policy_class(name))]
    words = {"''": "nothing"}
    defaults = {o.option: words.get(o.default, o.default) for o in card(name).options}
    for option, written in table:
        shown = written.strip("` ")
        if re.match(r"[\d.]+$", defaults[option]):
            assert _number(shown) == pytest.approx(float(defaults[option]), rel=0.01), option
        else:
            assert shown.strip("'") == defaults[option].strip("'"), option


def _table(text: str) -> str:
    """The rows of the options table, none if there is no such table."""
    _, found, rest = text.partition("| option | default | meaning |\n")
    return rest.partition("\n\n")[0] if found else ""


def _number(text: str) -> float:
    above, _, below = text.rstrip(".").partition("/")
    return float(above) / float(below or 1)


def test_no_page_is_about_a_policy_that_is_not_there():
    about = {path.stem for path in PAGES.glob("*.md")}
    assert about == {*available_policies(), "combinators", "README"}
