"""Writes docs/config.md from `RunConfig`: `python docs/config_reference.py`."""

from __future__ import annotations

from pathlib import Path

from frostline.tasks.config import RunConfig

PAGE = Path(__file__).with_name("config.md")
_HEAD = """\
# Settings

Every setting of a run. The same names work as flags (`--batch-size 64`), as keywords
(`frostline.fit(..., batch_size=64)`) and as keys of a YAML file (`--config run.yaml`); flags win
over the file. `frostline fit --print-config` shows the merged result and where each value is from.

This page is written by `docs/config_reference.py`; a test checks that it is current.

| setting | default | meaning |
|---|---|---|
"""


def page() -> str:
    """The page as it should be."""
    rows = []
    for name, field in RunConfig.model_fields.items():
        default = "required" if field.is_required() else f"`{_written(field.default)}`"
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {meaning} |\n")
    return _HEAD + "".join(rows)


def _written(default: object) -> str:
    if default is None:
        return "null"
    if default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
