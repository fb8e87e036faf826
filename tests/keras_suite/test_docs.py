"""The code in the pages on Keras runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "keras.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_runs_from_top_to_bottom(capsys) -> None:
    names: dict[str, Any] = {}
    for code in BLOCK.findall(PAGE.read_text("utf-8")):
        exec(code, names)  # noqa: S102  our own page
    said = capsys.readouterr().out
    assert names["groups"].names == ("block1", "block2", "head")
    assert "0 ['block1', 'block2']" in said
    assert "tensors proved" in said
    assert names["measured"].measured
