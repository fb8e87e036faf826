"""Every file shown on the page of schedules is read, and the page names every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from frostline.phase_file import Phase
from frostline.policies.phases import Phases
from frostline.testing import check_policy, example_groups

PAGE = Path(__file__).resolve().parents[2] / "docs/schedules.md"
FILES = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", FILES)
def test_every_file_on_the_page_is_read_and_runs(text: str, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text(text)
    options = {"strip": "model.", "lr": 3e-4} if text.startswith("0:") else {}
    policy = Phases(str(tmp_path / "schedule.yaml"), **options)  # type: ignore[arg-type]
    check_policy(policy, example_groups(4))
    assert len(policy.phases(None)) >= 2


def test_the_page_shows_both_forms_and_every_key() -> None:
    assert len(FILES) == 3
    keys = {*Phase.__dataclass_fields__} - {"place"}
    assert keys <= set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))
